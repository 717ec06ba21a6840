"""What is changed inside DeepSpeed, and what is read there that it promises nobody. Each with its reason and its end.

tests/integration/test_deepspeed_patches.py holds that each has its effect: `pytest -m bites` after an upgrade.
"""

from qlora_ray.worker.deepspeed_patches.hooks import (
    gather_as_one,
    keep_resident,
    leaves,
    make_available,
    mark_no_ranges,
    name_the_device_of_streams,
    print_only_on_demand,
    time_gathers,
    walk_past_leaves,
)
from qlora_ray.worker.deepspeed_patches.optimizer import (
    end_backward,
    link_moments_once_all_are_there,
    make_optimizer_state,
    master_of,
    put_gradient,
    take_norm_as_known,
    torch_optimizer,
)
from qlora_ray.worker.deepspeed_patches.shares import (
    Shares,
    gathered,
    has_shards,
    keep_out_of_zero,
    whole_of,
    whole_shape,
)
from qlora_ray.worker.deepspeed_patches.start import begin, for_each_micro_batch, initialize, use_gloo_on_cpus

__all__ = [
    "Shares",
    "begin",
    "end_backward",
    "for_each_micro_batch",
    "gather_as_one",
    "gathered",
    "has_shards",
    "initialize",
    "keep_out_of_zero",
    "keep_resident",
    "leaves",
    "link_moments_once_all_are_there",
    "make_available",
    "make_optimizer_state",
    "mark_no_ranges",
    "master_of",
    "name_the_device_of_streams",
    "print_only_on_demand",
    "put_gradient",
    "take_norm_as_known",
    "time_gathers",
    "torch_optimizer",
    "use_gloo_on_cpus",
    "walk_past_leaves",
    "whole_of",
    "whole_shape",
]
