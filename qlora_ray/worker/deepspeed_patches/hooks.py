"""What ZeRO-3 does around each layer: fewer walks, ranges, prints and gathers, and those timed."""

from collections.abc import Callable
from typing import Any

import torch

from qlora_ray.libraries import Patch
from qlora_ray.model.fused import leaf_modules
from qlora_ray.model.plain import plain_layers
from qlora_ray.worker.stopwatch import Stopwatch

KNOWN_PARAMETERS = Patch(
    "deepspeed", "0.19.8", "named_parameters of leaf modules and of the model answer from a list",
    gains="ZeRO-3's hooks walk each layer's module tree several times a step, while the GPU waits",
    delete_when="partitioned_param_coordinator.iter_params keeps what it found",
)  # fmt: skip


def gather_as_one(model: Any) -> None:
    """Make each decoder layer one unit of ZeRO-3: gathered as a whole, announced by one pair of hooks."""
    from deepspeed.utils import set_z3_leaf_module

    for module in leaves(model):
        set_z3_leaf_module(module, True)
        remember_parameters(module)
    remember_parameters(model)
    if plain_layers(model):
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
    "deepspeed", "0.19.8", "DeepSpeedEngine._forward_prologue and _forward_epilogue do not visit what is inside leaves",
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
    "deepspeed", "0.19.8", "deepspeed.utils.nvtx.enable_nvtx is off",
    gains="two calls into the profiler's library at each hook",
    delete_when="they are off unless someone profiles",
)  # fmt: skip


def mark_no_ranges() -> None:
    """Switch off the ranges that DeepSpeed marks for profilers."""
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False


DEBUG_PRINTS = Patch(
    "deepspeed", "0.19.8", "partition_parameters.print_rank_0 asks whether to print before it asks for the rank",
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
    "deepspeed", "0.19.8", "get_accelerator().current_stream names the device to torch",
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
    "deepspeed", "0.19.8", "ds_persist and optimizer.persistent_parameters hold the trained parameters",
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


TIMED_GATHERS = Patch(
    "deepspeed", "0.19.8", "fetch_sub_module of ZeRO-3's parameter coordinator is timed",
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
