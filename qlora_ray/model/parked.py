"""Attention between forward and backward without what it read: its output and sums lie in host memory, the rest is made
again by the projections, which is little beside the attention of long rows.
"""

# B rows, H heads, T tokens, E values of a head
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

SLOTS = 4  # of a layer: three for what attention keeps, the last for the layer's input, which backward asks for first
SMALL_BYTES = 2**16  # what is not worth a copy: seeds, borders


class Stash(Protocol):
    """Where tensors are put between forward and backward."""

    def put(self, slot: int, x: torch.Tensor) -> None:
        """Take a copy."""

    def take(self, slot: int) -> torch.Tensor:
        """The copy."""


def input_slot(layer: int) -> int:
    """Where a layer's input lies."""
    return SLOTS * layer + SLOTS - 1


class ParkedAttention:
    """One layer's. Where there is no stash what it keeps stays where it is."""

    def __init__(self, layer: int, stash: Stash | None):
        self._first, self._stash = SLOTS * layer, stash
        self._parts: tuple[torch.Tensor, ...] = ()
        self._starts: dict[int, int] = {}  # by address of a storage: the part that lies in it
        self._slots: dict[int, tuple[int, torch.Tensor]] = {}  # by address while it cannot be another's: what is parked
        self._back: dict[int, torch.Tensor] = {}  # by slot: what came back

    def forward(self, attend: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
        """attend(*parts), which are q, k and v, (B, H, T, E) each with a gradient."""
        self._parts = parts
        self._starts = {_address(part): number for number, part in enumerate(parts)}
        with torch.enable_grad(), saved_tensors_hooks(self._pack, self._unpack):
            output = attend(*parts)
        self._edge = get_gradient_edge(output)
        self._output = self._pack(output.detach())
        self._slots.clear()
        return output.detach()

    def let_go(self) -> None:
        """Forget the parts: backward brings them again."""
        for part in self._parts:
            part.data = part.new_empty(0)

    def come_back(self, *parts: torch.Tensor) -> torch.Tensor:
        """Take the parts, made again as they lay in memory; returns the output."""
        self._again = parts
        return self._unpack(self._output)

    def backward(self, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of the parts."""
        return torch.autograd.grad([self._edge], self._parts, [grad])  # type: ignore[list-item]

    def _pack(self, tensor: torch.Tensor) -> Any:
        number, view = self._starts.get(_address(tensor)), (tensor.shape, tensor.stride())
        if number is not None:
            return "part", number, (*view, tensor.storage_offset() - self._parts[number].storage_offset())
        whole = tensor.untyped_storage()
        if self._stash is None or whole.nbytes() < SMALL_BYTES:
            return "here", tensor, view
        if _address(tensor) not in self._slots:
            if len(self._slots) == SLOTS - 1:
                return "here", tensor, view
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(whole)
            self._slots[_address(tensor)] = self._first + len(self._slots), flat
            self._stash.put(*self._slots[_address(tensor)])
        return "parked", self._slots[_address(tensor)][0], (*view, tensor.storage_offset())

    def _unpack(self, packed: Any) -> torch.Tensor:
        kind, what, view = packed
        if kind == "here":
            return what
        if kind == "part":
            part = self._again[what].detach()
            return part.as_strided(view[0], view[1], part.storage_offset() + view[2])
        if what not in self._back:
            assert self._stash is not None
            self._back[what] = self._stash.take(what)
        return self._back[what].as_strided(*view)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
