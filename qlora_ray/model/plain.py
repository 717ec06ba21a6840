"""Decoder layers that are not fused: each keeps what autograd keeps of it, or its input alone, here or on the host.

Stands on an internal of transformers: LAYER_CHECKPOINTS.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from qlora_ray.libraries import Patch
from qlora_ray.model.recompute import Keep
from qlora_ray.model.stash import HostStash

LAYER_CHECKPOINTS = Patch(
    "transformers", "5.23.0", "gradient_checkpointing and _gradient_checkpointing_func of GradientCheckpointingLayer "
    "are set for each layer by itself; its first positional argument is the hidden states",
    gains="layers keep their activations as far as memory goes, instead of all or none",
    delete_when="activation checkpointing of transformers takes what each layer shall keep",
)  # fmt: skip


def plain_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers that are not fused, first to last; none of a model that does not mark its layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and "fused" not in m.__dict__]


def keep_plain(layers: list[torch.nn.Module], levels: Sequence[Keep], stash: HostStash | None) -> None:
    """Set what each layer keeps for backward; without a stash, inputs for the host stay where they are."""
    for slot, (layer, level) in enumerate(zip(layers, levels, strict=True)):
        is_parked = level == Keep.HOST and stash is not None
        layer.gradient_checkpointing = level >= Keep.INPUT  # type: ignore[assignment]
        layer._gradient_checkpointing_func = partial(_parked, stash, slot) if is_parked else _again  # type: ignore


def _again(forward: Callable[..., Any], *given: Any) -> Any:
    # Reentrant: the other kind keeps ZeRO-3's gathered weights alive through bitsandbytes' autograd function.
    return checkpoint(forward, *given, use_reentrant=True)


def _parked(stash: HostStash, slot: int, forward: Callable[..., Any], hidden: torch.Tensor, *others: Any) -> Any:
    def pack(tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.data_ptr() != hidden.data_ptr():
            return tensor
        stash.put(slot, tensor)
        return None

    with saved_tensors_hooks(pack, lambda tensor: stash.take(slot) if tensor is None else tensor):
        return _again(forward, hidden, *others)


def measure_whole_bytes(model: Any, input_ids: torch.Tensor) -> int:
    """The most that autograd keeps of a plain layer, in bytes for each token of `input_ids` (B, T).

    Runs the layers forward, one at a time: never more than one layer's activations are there.
    """
    layers, weights = plain_layers(model), {_address(p) for p in (*model.parameters(), *model.buffers())}
    found: list[int] = []
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = partial(_count, found, weights)  # type: ignore[assignment]
    model.train()
    with torch.no_grad():
        model.get_base_model().base_model(input_ids=input_ids, use_cache=False)
    keep_plain(layers, (Keep.ALL,) * len(layers), None)
    return max(found) // input_ids.numel()


def _count(found: list[int], weights: set[int], forward: partial, hidden: torch.Tensor, *others: Any) -> Any:
    of_all = {_address(x) for x in tree_leaves((others, forward.keywords)) if isinstance(x, torch.Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        given = forward(hidden.detach().requires_grad_(), *others)
    found.append(sum(size for address, size in kept.items() if address not in weights | of_all))
    return tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, given)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
