"""Decoder layers that are not fused: each keeps what autograd keeps of it, or its input alone, here or on the host.

Stands on an internal of transformers: LAYER_CHECKPOINTS.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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


# Within what it returns, these parameters are whole.
Gathered = Callable[[list[torch.nn.Parameter]], AbstractContextManager[Any]]


def plain_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers that are not fused, first to last; none of a model that does not mark its layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and "fused" not in m.__dict__]


def keep_plain(layers: list[torch.nn.Module], levels: Sequence[Keep], stash: HostStash | None) -> None:
    """Set what each layer keeps for backward; without a stash, inputs for the host stay where they are."""
    for slot, (layer, level) in enumerate(zip(layers, levels, strict=True)):
        is_parked = level == Keep.HOST and stash is not None
        layer.gradient_checkpointing = level >= Keep.INPUT  # type: ignore[assignment]
        again = partial(_again, layer.__dict__.get("bring_weights"))
        layer._gradient_checkpointing_func = partial(_parked, stash, slot, again) if is_parked else again  # type: ignore


def _again(bring_weights: Callable[[], None] | None, forward: Callable[..., Any], *given: Any) -> Any:
    def forward_with_weights(*inputs: Any) -> Any:
        if bring_weights:  # transformers calls a module's hooks outside of what is computed again
            bring_weights()
        return forward(*inputs)

    # Reentrant: the other kind keeps ZeRO-3's gathered weights alive through bitsandbytes' autograd function.
    return checkpoint(forward_with_weights, *given, use_reentrant=True)


def _parked(
    stash: HostStash, slot: int, again: Callable[..., Any], forward: Callable[..., Any], hidden: torch.Tensor,
    *others: Any,
) -> Any:  # fmt: skip
    def pack(tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.data_ptr() != hidden.data_ptr():
            return tensor
        stash.put(slot, tensor)
        return None

    with saved_tensors_hooks(pack, lambda tensor: stash.take(slot) if tensor is None else tensor):
        return again(forward, hidden, *others)


def measure_whole_bytes(model: Any, input_ids: torch.Tensor, gathered: Gathered) -> int:
    """The most that autograd keeps of a plain layer, in bytes for each token of `input_ids` (B, T).

    Runs the layers forward, one at a time: never more than one layer's activations are there, nor its weights where
    each worker has a share of them, which `gathered` puts together. Every worker must call this.
    """
    layers, found = plain_layers(model), list[int]()
    of_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    beside = [parameter for parameter in model.parameters() if id(parameter) not in of_layers]
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = partial(_count, found, layer, gathered)  # type: ignore[assignment]
    model.train()
    with torch.no_grad(), gathered(beside):
        model.get_base_model().base_model(input_ids=input_ids, use_cache=False)
    keep_plain(layers, (Keep.ALL,) * len(layers), None)
    return max(found) // input_ids.numel()


def _count(
    found: list[int], layer: torch.nn.Module, gathered: Gathered, forward: partial, hidden: torch.Tensor, *others: Any
) -> Any:
    of_all = {_address(x) for x in tree_leaves((others, forward.keywords)) if isinstance(x, torch.Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with gathered(list(layer.parameters())):
        weights = {_address(one) for one in (*layer.parameters(), *layer.buffers())}
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
            given = forward(hidden.detach().requires_grad_(), *others)
    found.append(sum(size for address, size in kept.items() if address not in weights | of_all))
    return tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, given)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
