"""The MLP of a fused layer by slices of rows: of long rows gate, up and their gradients never lie in memory whole.

Where rows are cut depends on their number alone. There the sums of LoRA gradients are cut, too, whether the MLP takes
slices or not, and added block after block in float32: the bits are the same either way, whatever is kept for backward,
on any number of workers.
"""

# M tokens, S of them in a slice, D hidden width, I width of the MLP
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from qlora_ray.model.member import Turn
from qlora_ray.model.recompute import LONG_ROW, SLICE_ROWS, Keep

FusedLayer: TypeAlias = Any  # of layer.py, which calls this
Kept: TypeAlias = Any


def of_rows(count: int, length: int) -> tuple[slice, ...]:
    """Slices of so many rows, of samples in rows of `length` tokens; none where all are taken at once."""
    if length <= LONG_ROW or count <= SLICE_ROWS:
        return ()
    return tuple(slice(start, min(start + SLICE_ROWS, count)) for start in range(0, count, SLICE_ROWS))


def mlp_part(layer: FusedLayer, kept: Kept, with_graph: bool) -> torch.Tensor:
    """`FusedLayer.mlp_part` by slices: the layer's output (M, D). Fills in what is kept of them."""
    like, count = kept.x1, len(kept.x1)
    y = torch.empty_like(like)
    if with_graph and layer.keep < Keep.ATTENTION:
        kept.gate_up = like.new_empty(count, sum(layer.gate_up.rows))
    if with_graph and layer.down.rank:
        kept.z_down = like.new_empty(count, layer.down.members[0].rank)
    if with_graph and layer.keep < Keep.PARKED and layer.keeps_given[1]:
        kept.given2 = like.new_empty(count, layer.down.rows[0])
    with _weights_made_once(layer, kept, layer.down):
        for rows in kept.slices:
            part = _part(kept, rows)
            part.n2 = layer.read_mlp(part)
            z_down, given2, part.given2 = part.z_down, part.given2, None
            y[rows] = layer.mlp_part(part, with_graph)
            for whole, made in ((z_down, part.z_down), (given2, part.given2)):
                if whole is not None:
                    whole.copy_(made)
    return y


def through_mlp(layer: FusedLayer, kept: Kept, buffer: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`FusedLayer.through_mlp` by slices; the gradient of x1 takes the place of dy where it has as much room."""
    width, room = layer.qkv.inputs, layer.out.room
    has_room = buffer.shape[1] == width + room
    made = buffer if has_room else buffer.new_empty(len(buffer), width + room)

    def gradients_of_slices() -> Iterator[list[torch.Tensor]]:
        for rows in kept.slices:
            part = _part(kept, rows)
            part.n2 = layer.read_mlp(part)
            layer.complete_mlp(part)
            gradients, dx1 = layer.through_mlp(part, buffer[rows])
            made[rows, :width] = dx1[:, :width]
            yield gradients

    again = [layer.down] if layer.keeps_given[1] and kept.given2 is None else []
    with _weights_made_once(layer, kept, layer.down_back, *again):
        return _added(gradients_of_slices()), made


def summed(
    blocks: tuple[slice, ...], gradients_of: Callable[..., list[torch.Tensor]], turn: Turn, *read: Any
) -> list[torch.Tensor]:
    """`gradients_of` what was read (M, ...) and its turn, block after block of rows; of all at once without blocks."""
    if not blocks:
        return gradients_of(*read, turn)
    device = read[0].device
    parts = ((*(one if one is None else one[rows] for one in read), turn.of_rows(rows, device)) for rows in blocks)
    return _added(gradients_of(*part) for part in parts)


def _added(parts: Iterable[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Gradients added part after part, in float32."""
    sums: list[torch.Tensor] = []
    dtypes: list[torch.dtype] = []
    for gradients in parts:
        if not sums:
            sums, dtypes = [gradient.float() for gradient in gradients], [gradient.dtype for gradient in gradients]
            continue
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    return [total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True)]


def _part(kept: Kept, rows: slice) -> Kept:
    """What is kept of some rows."""
    names = ("x1", "gate_up", "z_down", "given2")
    cut: dict[str, Any] = {name: None if (whole := getattr(kept, name)) is None else whole[rows] for name in names}
    return replace(kept, x=None, n2=None, places=None, blocks=(), slices=(), **cut,
                   turns=tuple(turn.of_rows(rows, kept.x1.device) for turn in kept.turns),
                   drops=tuple(drop.of_rows(rows, kept.x1.device) for drop in kept.drops))  # fmt: skip


@contextmanager
def _weights_made_once(layer: FusedLayer, kept: Kept, *of_down) -> Iterator[None]:
    with ExitStack() as stack:
        for group in (layer.gate_up, *of_down):
            stack.enter_context(group.made_once(kept.x1, kept.turns[2 if group is layer.gate_up else 3]))
        yield
