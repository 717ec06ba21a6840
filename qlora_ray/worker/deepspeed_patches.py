"""What is changed inside DeepSpeed, and what is read there that it promises nobody. Each with its reason and its end.

tests/integration/test_deepspeed_patches.py holds that each has its effect: `pytest -m bites` after an upgrade.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.libraries import Patch
from qlora_ray.model.fused import leaf_modules
from qlora_ray.model.plain import plain_layers
from qlora_ray.model.shares import Share
from qlora_ray.worker.state import MOMENTS
from qlora_ray.worker.stopwatch import Stopwatch

READ_IN = "0.19.8"

SHARED_MEMORY = Patch(
    "deepspeed", READ_IN, "deepspeed.ops.__compatible_ops__ says that the shared-memory collective does not fit",
    gains="25 s and the need for a compiler at the first collective on CPUs; gloo does the same",
    delete_when="DeepSpeed compiles it only where a config asks for it",
)  # fmt: skip


def use_gloo_on_cpus() -> None:
    """Have DeepSpeed not compile a collective of its own. Call it before deepspeed.init_distributed."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def begin() -> None:
    """Start DeepSpeed on the process group that is there."""
    import deepspeed

    if not torch.cuda.is_available():
        use_gloo_on_cpus()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def for_each_micro_batch(deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """The config without what the engine does itself: sum, norm and clipping, in an order of its own."""
    config = {**deepspeed_config, "gradient_clipping": 0.0, "gradient_accumulation_steps": 1}
    config.pop("train_batch_size", None)  # of all workers that there may be; elastic runs have fewer
    return config


BORN_IN_SHARES = Patch(
    "deepspeed", READ_IN, "zero.Init's _convert_to_deepspeed_param takes a parameter without memory, and ds_tensor, "
    "ds_numel_aligned, ds_status and data are set as its _partition_param sets them; where a node's "
    "workers hold it together, ds_zero_partition_process_group names them",
    gains="no worker holds a whole base while loading; zero.Init partitions what is whole on each",
    delete_when="DeepSpeed makes parameters of shares, or transformers enters zero.Init for quantized models",
)  # fmt: skip


class Shares:
    """Makes ZeRO-3's parameters of what this worker has of them: model/load.py's Keeper."""

    def __init__(self, deepspeed_config: dict[str, Any], dtype: torch.dtype, group: Any = None):
        import deepspeed

        begin()
        self._group = group  # of the workers that hold it together; None: all
        self.share = Share(dist.get_rank(group), dist.get_world_size(group))
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
        parameter.ds_tensor, parameter.ds_numel_aligned = held, held.numel() * self.share.size
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

    def whole(self, parameter: Any) -> torch.Tensor:
        """What all workers hold of it together."""
        return whole_of(parameter)

    def take_largest(self, values: torch.Tensor) -> None:
        """Put the largest of all workers' values in the place of each."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)

    def is_everywhere(self, answer: bool) -> bool:
        """Whether the answer is yes on every worker."""
        answers = torch.tensor(int(answer), device=self._init.local_device)
        dist.all_reduce(answers, dist.ReduceOp.MIN)
        return bool(answers)


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Within, these parameters are whole, where each worker has a share of them. Every worker must enter it."""
    import deepspeed

    shared = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(shared) if shared else nullcontext()


OUT_OF_ZERO = Patch(
    "deepspeed", READ_IN, "frozen parameters that each worker holds whole lie in the __dict__ of their modules, where "
    "named_parameters, and so ZeRO-3, does not find them",
    gains="ZeRO-3 holds what is trained, and gathers, copies and casts nothing of the base",
    delete_when="ZeRO-3 can be told which parameters to leave alone",
)  # fmt: skip


def keep_out_of_zero(model: torch.nn.Module) -> None:
    """Have ZeRO-3 not see what is frozen; modules read it as ever. Call it when the trained ones are flat.

    The smallest stays: transformers asks a model's first parameter for its device.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    smallest = min(frozen, key=torch.Tensor.numel, default=None)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad and parameter is not smallest:
                del module._parameters[name]
                module.__dict__[name] = parameter


KNOWN_PARAMETERS = Patch(
    "deepspeed", READ_IN, "named_parameters of leaf modules and of the model answer from a list",
    gains="ZeRO-3's hooks walk each layer's module tree several times a step, while the GPU waits",
    delete_when="partitioned_param_coordinator.iter_params keeps what it found",
)  # fmt: skip


def gather_as_one(model: torch.nn.Module) -> None:
    """Make each decoder layer one unit of ZeRO-3: gathered as a whole, announced by one pair of hooks."""
    from deepspeed.utils import set_z3_leaf_module

    for module in leaves(model):
        set_z3_leaf_module(module, True)
        remember_parameters(module)
    remember_parameters(model)
    model.enable_input_require_grads()  # else the first layer's backward is never announced to ZeRO-3


def leaves(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What ZeRO-3 gathers as one: decoder layers, and outside them what reads its submodules' weights itself."""
    layers = plain_layers(model)
    inside = {id(part) for layer in layers for part in layer.modules()}
    return [*layers, *(module for module in leaf_modules(model) if id(module) not in inside)]


def remember_parameters(module: torch.nn.Module) -> None:
    """Have the module name its parameters, which do not change any more, without a walk through its tree."""
    parameters, plain = list(module.named_parameters()), module.named_parameters

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        return iter(parameters) if recurse and not prefix and remove_duplicate else plain(prefix, recurse)

    module.named_parameters = named_parameters  # type: ignore[assignment]


SHORT_WALKS = Patch(
    "deepspeed", READ_IN, "DeepSpeedEngine._forward_prologue and _forward_epilogue do not visit what is inside leaves",
    gains="a visit of every module, of thousands, before and after each forward pass, while the GPU has nothing to do",
    delete_when="they pass leaf modules by, or mark nothing",
)  # fmt: skip


def walk_past_leaves(engine: Any) -> None:
    """Have DeepSpeed visit fewer modules around a forward pass.

    It marks them, so that a parameter that one module takes from another is found. Leaf modules are gathered whole.
    """
    model = engine.module
    inside = {id(part) for leaf in leaves(model) for part in leaf.modules() if part is not leaf}
    visited = [module for module in model.modules() if id(module) not in inside]

    def walking_less(walk: Callable[..., Any]) -> Callable[..., Any]:
        def walk_less(*arguments: Any) -> Any:
            model.__dict__["modules"] = lambda: iter(visited)
            try:
                return walk(*arguments)
            finally:
                del model.__dict__["modules"]

        return walk_less

    engine._forward_prologue = walking_less(engine._forward_prologue)
    engine._forward_epilogue = walking_less(engine._forward_epilogue)


PROFILER_RANGES = Patch(
    "deepspeed", READ_IN, "deepspeed.utils.nvtx.enable_nvtx is off",
    gains="two calls into the profiler's library at each hook",
    delete_when="they are off unless someone profiles",
)  # fmt: skip


def mark_no_ranges() -> None:
    """Switch off the ranges that DeepSpeed marks for profilers."""
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False


DEBUG_PRINTS = Patch(
    "deepspeed", READ_IN, "partition_parameters.print_rank_0 asks whether to print before it asks for the rank",
    gains="a look-up of the process group for each parameter that is released",
    delete_when="print_rank_0 does so itself",
)  # fmt: skip


def print_only_on_demand() -> None:
    """Have prints that are off cost nothing."""
    from deepspeed.runtime.zero import partition_parameters

    plain = partition_parameters.print_rank_0

    def print_rank_0(message, debug=False, force=False):
        if debug or force:
            plain(message, debug, force)

    partition_parameters.print_rank_0 = print_rank_0


NAMED_STREAM = Patch(
    "deepspeed", READ_IN, "get_accelerator().current_stream names the device to torch",
    gains="torch looks up an unnamed device at length, at each gather",
    delete_when="CUDA_Accelerator.current_stream names it, or torch's look-up is short",
)  # fmt: skip


def name_the_device_of_streams() -> None:
    """Have DeepSpeed ask torch for the stream of a named device."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().current_stream = lambda index=None: torch.cuda.current_stream(
        torch.cuda.current_device() if index is None else index
    )


RESIDENT = Patch(
    "deepspeed", READ_IN, "ds_persist and optimizer.persistent_parameters hold the trained parameters",
    gains="they are gathered once a step and not at each use, however large; the config knows a largest size alone",
    delete_when="a parameter can be named as resident in the config",
)  # fmt: skip


def keep_resident(optimizer: Any, parameters: list[Any]) -> None:
    """Have ZeRO-3 gather these after each step and not release them."""
    for parameter in parameters:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            optimizer.persistent_parameters.append(parameter)


def make_available(parameters: list[Any]) -> None:
    """Gather those that ZeRO-3 has released: it keeps nothing resident until it has seen a whole step twice."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    released = [parameter for parameter in parameters if parameter.ds_status != ZeroParamStatus.AVAILABLE]
    if released:
        released[0].all_gather(released)


KNOWN_NORM = Patch(
    "deepspeed", READ_IN, "ZeRO-3's _get_norm_groups answers 1",
    gains="the norm that Engine.step knows already, computed again and waited for",
    delete_when="ZeRO-3's step computes no norm where it neither clips nor scales",
)  # fmt: skip


def take_norm_as_known(optimizer: Any) -> None:
    """Have ZeRO-3's step, which does not clip here, compute no norm of the gradient."""
    optimizer._get_norm_groups = lambda: [torch.ones(())]


TIMED_GATHERS = Patch(
    "deepspeed", READ_IN, "fetch_sub_module of ZeRO-3's parameter coordinator is timed",
    gains="the seconds of communication that metrics.jsonl and the report tell",
    delete_when="DeepSpeed tells them by phase",
)  # fmt: skip


def time_gathers(optimizer: Any, stopwatch: Stopwatch) -> None:
    """Have the stopwatch tell the time that forward and backward wait for weights of other workers."""
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def fetch_sub_module(*arguments: Any, **options: Any) -> None:
        with stopwatch.aside("communication"):
            fetch(*arguments, **options)

    coordinator.fetch_sub_module = fetch_sub_module


OWN_GRADIENTS = Patch(
    "deepspeed", READ_IN, "a gradient is put where stages 1 and 2 look for it: averaged_gradients, or with "
    "offload the partition's grad",
    gains="sums in an order that does not depend on the number of workers; safe_set_full_grad knows stage 3 alone",
    delete_when="safe_set_full_grad sets it at every stage",
)  # fmt: skip


def put_gradient(optimizer: Any, number: int, value: torch.Tensor) -> None:
    """Give stages 1 and 2 this worker's share of the gradient of the number-th parameter."""
    size, rank = int(optimizer.partition_size[number]), dist.get_rank()
    share = torch.nn.functional.pad(value, (0, size * dist.get_world_size() - value.numel()))
    share = share[rank * size : (rank + 1) * size]
    if optimizer.cpu_offload:
        master = optimizer.single_partition_of_fp32_groups[number]
        master.grad = share.to(master.device, master.dtype)
    else:
        optimizer.averaged_gradients[number] = [share.to(optimizer.gradient_accumulation_dtype)]


SHARD_MARKS = Patch(
    "deepspeed", READ_IN, "ds_id and _hp_mapping say that ZeRO has a parameter's shards, ds_shape what they make",
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


def rank_among_holders(parameter: Any, rank: int) -> int:
    """Of this worker, whose rank among all is `rank`, among those that hold a parameter together."""
    return int(getattr(parameter, "ds_zero_partition_rank", rank))


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of a parameter, which ZeRO-3 may have emptied."""
    return getattr(parameter, "ds_shape", parameter.shape)


MASTERS = Patch(
    "deepspeed", READ_IN, "fp16_groups and fp32_groups of FP16_UnfusedOptimizer lie side by side",
    gains="weights and moments of stage 0 in 16 bits by name",
    delete_when="safe_get_full_fp32_param and its like work at stage 0",
)  # fmt: skip


def master_of(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What stage 0 optimizes: the parameter, or in 16 bits its float32 copy."""
    pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
    copies = {id(p): copy for low, high in pairs for p, copy in zip(low, high, strict=True)}
    return copies.get(id(parameter), parameter)


OPTIMIZER_STATE = Patch(
    "deepspeed", READ_IN, "torch's optimizer lies in .optimizer of the wrapper, what ZeRO-3 gives it in "
    "fp32_partitioned_groups_flat; stages 1 and 2 link its state in _lazy_init_hp_params_optimizer_state",
    gains="moments go in before a first step, and a first step that a wrapper makes of zeros is not counted",
    delete_when="safe_set_full_optimizer_state works before the first step",
)  # fmt: skip


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that the engine was given, which DeepSpeed may have wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def make_optimizer_state(wrapper: Any, optimizer_step: int) -> None:
    """Give torch's AdamW the zeroed state that it would make in its first step, at the right step number."""
    optimizer = torch_optimizer(wrapper)
    groups = getattr(wrapper, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    if groups is None:
        groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for flat in groups:
        state = optimizer.state[flat]
        device = flat.device if optimizer.defaults["fused"] else "cpu"  # where torch's AdamW looks for it
        state["step"] = torch.tensor(float(optimizer_step), device=device)
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
    link_fragments = getattr(wrapper, "_lazy_init_hp_params_optimizer_state", None)  # stages 1 and 2
    if link_fragments is not None:
        link_fragments()


ALL_MOMENTS = Patch(
    "deepspeed", READ_IN, "stages 1 and 2 look for their moments, once, when the last group of parameters has stepped",
    gains="they look after the first group's step, and never find those of the others: LoRA+ would lose half at a save",
    delete_when="_optimizer_step of stage_1_and_2.py waits for all groups",
)  # fmt: skip


def link_moments_once_all_are_there(optimizer: Any) -> None:
    """Have stages 1 and 2 look for the moments of all groups of parameters once the last one has stepped."""
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:

        def link_if_all_are_there() -> None:
            if len(optimizer.optimizer.state) == len(optimizer.bit16_groups):
                link()

        optimizer._lazy_init_hp_params_optimizer_state = link_if_all_are_there
