"""The base in shares: parameters born so, made whole, or kept out of ZeRO's sight."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.libraries import Patch
from qlora_ray.worker.deepspeed_patches.start import begin, for_each_micro_batch

BORN_IN_SHARES = Patch(
    "deepspeed", "0.19.8", "zero.Init's _convert_to_deepspeed_param takes a parameter without memory, and ds_tensor, "
    "ds_numel_aligned, ds_status and data are set as its _partition_param sets them; where a node's "
    "workers hold it together, ds_zero_partition_process_group names them",
    gains="no worker holds a whole base while loading; zero.Init partitions what is whole on each",
    delete_when="DeepSpeed makes parameters of shares, or transformers enters zero.Init for quantized models",
)  # fmt: skip


class Shares:
    """Makes ZeRO-3's parameters of what this worker has of them."""

    def __init__(self, deepspeed_config: dict[str, Any], dtype: torch.dtype, group: Any = None):
        import deepspeed

        begin()
        self._group = group  # of the workers that hold it together; None: all
        self._size = dist.get_world_size(group)
        self._init = deepspeed.zero.Init(config_dict_or_path=for_each_micro_batch(deepspeed_config), dtype=dtype)

    def keep(self, parameter: Any, share: torch.Tensor) -> None:
        """Make of a parameter of the whole shape, without memory, one of which this worker holds `share`."""
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus

        init = self._init
        if self._group is not None:
            parameter.ds_zero_partition_process_group = self._group
        init._convert_to_deepspeed_param(parameter)
        held: Any = share.to(parameter.device if parameter.ds_persist else init.remote_device)
        if init.pin_memory and not parameter.ds_persist:
            held = get_accelerator().pin_memory(held)
        held.ds_numel, held.status, held.final_location = held.numel(), PartitionedParamStatus.AVAILABLE, None
        parameter.ds_tensor, parameter.ds_numel_aligned = held, held.numel() * self._size
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Within, these parameters are whole, where each worker has a share of them. Every worker must enter it."""
    import deepspeed

    shared = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(shared) if shared else nullcontext()


OUT_OF_ZERO = Patch(
    "deepspeed", "0.19.8", "frozen parameters that each worker holds whole, and those of fused layers, which pass "
    "between workers by model/apart.py, lie in the __dict__ of modules, where named_parameters does not find them",
    gains="ZeRO-3 holds what is trained, and gathers, copies and casts nothing of the base",
    delete_when="ZeRO-3 can be told which parameters to leave alone",
)  # fmt: skip


def keep_out_of_zero(modules: list[torch.nn.Module], stays: torch.nn.Parameter | None = None) -> None:
    """Have ZeRO-3 not see what is frozen in these modules, but for one parameter; they read it as ever.

    Call it when the trained ones are flat.
    """
    for module in (part for owner in modules for part in owner.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad and parameter is not stays:
                del module._parameters[name]
                module.__dict__[name] = parameter


SHARD_MARKS = Patch(
    "deepspeed", "0.19.8", "ds_id and _hp_mapping say that ZeRO has a parameter's shards, ds_shape what they make",
    gains="one way to read and write weights and moments at every stage: safe_get_full_fp32_param knows no stage 0",
    delete_when="safe_get_full_fp32_param and its like work at every stage",
)  # fmt: skip


def has_shards(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed's safe_get_full_fp32_param and its like know the parameter."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def whole_of(parameter: Any) -> torch.Tensor:
    """A copy of what the workers hold together. Every worker must call this."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    is_released = has_shards(parameter) and parameter.ds_status != ZeroParamStatus.AVAILABLE
    if is_released:
        parameter.all_gather([parameter])
    whole = parameter.detach().clone()
    if is_released:
        parameter.partition([parameter])
    return whole


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of a parameter, which ZeRO-3 may have emptied."""
    return getattr(parameter, "ds_shape", parameter.shape)
