"""The language-model head and its loss in one: logits exist for a few rows at a time, and never in backward."""

# M tokens, D hidden width, V vocabulary
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from qlora_ray.model.layer import FusedLayer
from qlora_ray.model.ops import ops_for

IGNORE_INDEX = -100  # as in transformers and torch
HALF_SCALE = 1024.0  # keeps probabilities of a large vocabulary among float16's normal numbers
LOGITS_BYTES = 256 * 2**20  # of one slice of rows: large enough for fast products, small beside a layer


def make_head_return_nats(head: Any, last: FusedLayer, divisor: float = 1.0) -> None:
    """Replace the forward of a frozen Linear head without bias: where labels are expected, it returns their nats.

    `last` is the layer before. `divisor` is what the model divides the head's logits by: it will divide the nats, too,
    which are as much larger.
    """
    plain = head.forward
    head.expected, head.last_layer = None, last

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if head.expected is None:
            return plain(hidden)
        labels, places = head.expected
        x = hidden.reshape(-1, hidden.shape[-1])  # (M, D); or the labels' rows, then zeros, if the last layer knew them
        if places is not None:
            x = x if len(x) < len(labels) else x[places]
            labels = F.pad(labels[places], (0, len(x) - len(places)), value=IGNORE_INDEX)
        nats = _Nats.apply(x, head, divisor, labels, torch.is_grad_enabled())
        nats = nats if places is None else nats[: len(places)]
        return nats * divisor if divisor != 1 else nats

    head.forward = forward


def returns_nats(head: torch.nn.Module | None) -> bool:
    """Whether a head has the loss in it (`make_head_return_nats`)."""
    return hasattr(head, "expected")


@contextmanager
def expecting(
    head: Any, labels: torch.Tensor, places: torch.Tensor | None = None, numbers: torch.Tensor | None = None
) -> Iterator[None]:  # fmt: skip
    """Within, the head returns the nats of these labels, one for each row of its input: float32, (M,).

    `places` are the rows that have a label that counts: where they are known, what only others need is left out, and
    the nats are theirs alone. `numbers` are those of the places in rows that are whole, of which these are parts.
    """
    last, count = head.last_layer, 0 if places is None else len(places)
    places = places if 0 < count < labels.numel() else None
    head.expected, last.places = (labels.reshape(-1), places), places
    last.place_numbers = numbers if count else None
    try:
        yield
    finally:
        head.expected = last.places = last.place_numbers = None


class _Nats(torch.autograd.Function):
    """Nats of each row, (M,) float32. The gradient is made in forward, while each slice's logits are at hand."""

    @staticmethod
    def forward(ctx, x, head, divisor: float, labels, with_gradient: bool):
        """x (M, D), labels (M,)."""
        weight = head.weight.data  # (V, D)
        dx = torch.empty_like(x) if with_gradient else None
        nats = torch.empty(len(x), dtype=torch.float32, device=x.device)
        scale = HALF_SCALE if x.dtype == torch.float16 else 1.0
        num_rows = max(128, LOGITS_BYTES // (weight.shape[0] * weight.element_size()) // 128 * 128)
        for start in range(0, len(x), num_rows):
            rows = slice(start, start + num_rows)
            logits = _aligned(x[rows], len(weight))  # (rows, V), in the end their gradient
            for part in _parts(len(weight)):
                torch.mm(x[rows], weight[part].t(), out=logits[:, part])
            if divisor != 1:
                logits /= divisor
            nats[rows] = ops_for(x.device).cross_entropy(logits, labels[rows], IGNORE_INDEX, scale)
            if dx is not None:
                for part in _parts(len(weight)):
                    dx[rows].addmm_(logits[:, part], weight[part], beta=1 if part.start else 0)
            del logits  # before the next slice's are made
        ctx.dx, ctx.scale = dx, scale * divisor
        return nats

    @staticmethod
    def backward(ctx, grad):
        dx, ctx.dx = ctx.dx, None
        return dx.mul_((grad / ctx.scale)[:, None]), None, None, None, None


def _parts(num_tokens: int) -> list[slice]:
    """A vocabulary as far as fast products go, whose sides are multiples of 8, and the few tokens that are left."""
    wide = num_tokens // 8 * 8
    return [part for part in (slice(0, wide), slice(wide, num_tokens)) if part.start < part.stop]


def _aligned(like: torch.Tensor, columns: int) -> torch.Tensor:
    """Room for (rows, columns) whose rows begin at multiples of 16 bytes, which products need to be fast."""
    return like.new_empty(len(like), -(-columns // 8) * 8)[:, :columns]
