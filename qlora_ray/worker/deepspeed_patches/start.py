"""DeepSpeed's start: without a compiler on CPUs, and without what the engine does itself."""

from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.libraries import Patch

SHARED_MEMORY = Patch(
    "deepspeed", "0.19.8", "deepspeed.ops.__compatible_ops__, found out by running a compiler, is empty from the start",
    gains="25 s and the need for a compiler at the first collective on CPUs, where gloo does the same; and half a "
    "second in which each worker runs gcc to see what else could be compiled",
    delete_when="DeepSpeed compiles it only where a config asks for it",
)  # fmt: skip
NO_PASSES = Patch(
    "deepspeed", "0.19.8", "deepspeed.runtime.engine.is_deepcompile_supported is asked when an engine is made",
    gains="a second of each worker's start on GPUs: torch's compiler, for passes that are taken where one compiles",
    delete_when="DeepSpeed imports them when an engine is compiled",
)  # fmt: skip


def use_gloo_on_cpus() -> None:
    """Have DeepSpeed neither compile a collective of its own nor try to. Call it before deepspeed.init_distributed."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def begin() -> None:
    """Start DeepSpeed on the process group that is there."""
    import deepspeed

    if not torch.cuda.is_available():
        use_gloo_on_cpus()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def initialize(**given: Any) -> Any:
    """deepspeed.initialize, which imports nothing to compile with."""
    import deepspeed
    from deepspeed.runtime import engine

    def says_no() -> bool:
        return False

    asked, engine.is_deepcompile_supported = engine.is_deepcompile_supported, says_no
    try:
        return deepspeed.initialize(**given)
    finally:
        engine.is_deepcompile_supported = asked


def for_each_micro_batch(deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """The config without what the engine does itself: sum, norm and clipping, in an order of its own."""
    config = {**deepspeed_config, "gradient_clipping": 0.0, "gradient_accumulation_steps": 1}
    config.pop("train_batch_size", None)  # of all workers that there may be; elastic runs have fewer
    return config
