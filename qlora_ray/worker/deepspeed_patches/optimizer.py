"""Gradients, weights and moments where each ZeRO stage keeps them."""

from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.libraries import Patch
from qlora_ray.worker.state import MOMENTS

KNOWN_NORM = Patch(
    "deepspeed", "0.19.8", "ZeRO-3's _get_norm_groups answers 1",
    gains="the norm that Engine.step knows already, computed again and waited for",
    delete_when="ZeRO-3's step computes no norm where it neither clips nor scales",
)  # fmt: skip


def take_norm_as_known(optimizer: Any) -> None:
    """Have ZeRO-3's step, which does not clip here, compute no norm of the gradient."""
    optimizer._get_norm_groups = lambda: [torch.ones(())]


def end_backward(optimizer: Any) -> None:
    """Have ZeRO-3 lay out gradients for its step, as it does behind a backward pass of its own (OWN_GRADIENTS)."""
    optimizer.overlapping_partition_gradients_reduce_epilogue()


OWN_GRADIENTS = Patch(
    "deepspeed", "0.19.8", "a gradient is put where stages 1 and 2 look for it: averaged_gradients, or with "
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


MASTERS = Patch(
    "deepspeed", "0.19.8", "fp16_groups and fp32_groups of FP16_UnfusedOptimizer lie side by side",
    gains="weights and moments of stage 0 in 16 bits by name",
    delete_when="safe_get_full_fp32_param and its like work at stage 0",
)  # fmt: skip


def master_of(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What stage 0 optimizes: the parameter, or in 16 bits its float32 copy."""
    pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
    copies = {id(p): copy for low, high in pairs for p, copy in zip(low, high, strict=True)}
    return copies.get(id(parameter), parameter)


OPTIMIZER_STATE = Patch(
    "deepspeed", "0.19.8", "torch's optimizer lies in .optimizer of the wrapper, what ZeRO-3 gives it in "
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
    "deepspeed", "0.19.8", "stages 1 and 2 look for their moments, once, when the last group of parameters has stepped",
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
