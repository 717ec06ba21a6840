"""Bytes that a worker gets from the others in an optimizer step. Pure."""

from dataclasses import dataclass, replace

from qlora_ray.model.recompute import LayerShape
from qlora_ray.planning.memory import NUM_SLOTS, Sizes, passing_bytes, slab_bytes
from qlora_ray.planning.sharing import exchanged_bytes

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes a worker and step, by what they are."""

    base: float  # layers, embedding and output layer that others hold
    gradients: float  # of the micro-batches, and their sum: worker/sums.py
    weights: float  # trained ones, which ZeRO has each worker update a share of
    rows: float  # q, k, v and their gradients, where workers share rows: at most

    @property
    def total(self) -> float:
        """Of all."""
        return self.base + self.gradients + self.weights + self.rows

    def __str__(self) -> str:
        parts = {"base": self.base, "gradients": self.gradients, "weights": self.weights, "rows": self.rows}
        unit, size = ("GB", 1e9) if self.total >= 1e8 else ("MB", 1e6)
        told = ", ".join(f"{name} {value / size:,.2f}" for name, value in parts.items() if value)
        return f"a worker gets {self.total / size:,.2f} {unit} a step from the others ({told})"


def traffic(known: Sizes, num_workers: int, num_micro_batches: int, num_tokens: int) -> Traffic | None:
    """Of a step of so many micro-batches a worker, each of so many of its tokens; None where there is one worker."""
    if num_workers == 1:
        return None
    others, trained = 1 - 1 / num_workers, known.num_trainable
    low = trained * known.element_bytes * others
    return Traffic(
        base=num_micro_batches * base_bytes(known, num_workers),
        gradients=num_micro_batches * low + trained * FLOAT32 * others,
        weights=low if known.stage else 0.0,
        rows=num_micro_batches * exchanged_bytes(known.layer, known.base.num_layers, num_tokens),
    )


def base_bytes(known: Sizes, num_workers: int) -> float:
    """Of the base, each micro-batch, where so many workers are there.

    Forward and backward bring each fused layer, but for those that the slots still hold from the turn before
    (model/ring.py), and the two ends in turn (model/ends.py). Of layers that are not fused ZeRO-3 gathers the weights,
    not their scales, and embedding and output layer in both passes, too.
    """
    others = 1 - 1 / replace(known, num_workers=num_workers).num_sharing
    end = known.base.vocab_size * known.base.hidden_size * known.element_bytes
    if isinstance(known.layer, LayerShape):
        ends = 2 * end if num_ends(known) > 1 else 0.0  # one that is both stays in its slot
        return others * (2 * max(0, known.base.num_layers - NUM_SLOTS) * slab_bytes(known) + ends)
    weights = known.base.num_packed_parameters / 2 if known.quantized else passing_bytes(known)
    return others * 2 * (weights + num_ends(known) * end)


def num_ends(known: Sizes) -> int:
    """Of embedding and output layer: 1 where one weight is both."""
    base = known.base
    experts = base.experts.num_parameters if base.experts else 0
    beside = base.num_parameters - base.num_linear_parameters - experts
    return 2 if beside >= 2 * base.vocab_size * base.hidden_size else 1
