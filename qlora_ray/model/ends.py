"""Embedding and output layer of a model whose weights pass: one slot, which each has in turn.

The output layer comes while the layers compute forward, and the embedding while they compute backward: a head with the
loss in it makes its gradient in forward (model/head.py), and a frozen embedding needs no weights for one.
"""

from typing import Any

import torch

from qlora_ray.model.head import returns_nats
from qlora_ray.model.ring import Copies, Ring, Slab, mark


def ends_that_pass(model: Any) -> list[torch.nn.Module]:
    """Embedding and output layer, or the one that both are; none where more is done with them than to read them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (isinstance(embedding, torch.nn.Embedding) and returns_nats(head)):
        return []
    if embedding.weight.requires_grad or head.weight.requires_grad:
        return []
    return [head] if head.weight is embedding.weight else [embedding, head]


class Ends:
    """The slabs of the ends that `ring`'s layers lie between."""

    def __init__(self, model: Any, slabs: list[Slab], ring: Ring, copies: Copies):
        device = ring.device
        self.modules = [model.get_input_embeddings(), model.get_output_embeddings()]
        self.slabs, self._ring, self._device, self._copies = slabs, ring, device, copies
        self._slot = torch.empty(max(slab.num_bytes for slab in slabs), dtype=torch.uint8, device=device)
        self._holds: int | None = None
        self._arrival: Any = None
        self._index = {id(parameter): number for number, slab in enumerate(slabs) for parameter in slab.parameters}
        for slab in slabs:
            slab.show(self._slot)
        self._watch()

    def _watch(self) -> None:
        """Have each there when the model calls it, and the other on its way behind it."""
        head, last = self.modules[1], len(self.slabs) - 1
        for end, own, other in zip(self.modules, (0, last), (last, 0), strict=True):
            end.register_forward_pre_hook(lambda *_, own=own: self._bring(own))
            end.register_forward_hook(lambda *_, other=other: self._launch(other))
        head.register_forward_pre_hook(lambda *_: _refuse_backward_without_nats(head))

    def bring(self, parameter: torch.Tensor) -> None:
        """Have a parameter's values there, if it is of an end."""
        number = self._index.get(id(parameter))
        if number is not None:
            self._bring(number)

    def _launch(self, number: int) -> None:
        if self._holds != number:
            self._holds = number
            self._arrival = self._copies.copy(self.slabs[number], self._slot, mark(self._device))

    def _bring(self, number: int) -> None:
        self._launch(number)
        if self._arrival is not None:
            with self._ring.waiting():
                self._copies.wait(self._arrival)
            self._arrival = None


def _refuse_backward_without_nats(head: Any) -> None:
    """autograd would find another end's weights in its slot."""
    assert head.expected is not None or not torch.is_grad_enabled(), "a head that passes has its loss in it"
