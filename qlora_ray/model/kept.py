"""What a decoder layer keeps between forward and backward, and what the layers of a model have in common."""

# B rows, T tokens per row, M = B x T, D hidden width, E head size, I width of the MLP, U = 2 I with a gate, else I
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from qlora_ray.model.dropout import NOTHING, Drop
from qlora_ray.model.member import Turn
from qlora_ray.model.parked import ParkedAttention
from qlora_ray.model.row_group import Holders, RowGroup
from qlora_ray.model.stash import HostStash

# A tensor, or None: not kept, and made again before backward reads it. The layer knows which of its steps made it.
Activation: TypeAlias = Any


@dataclass
class Kept:
    """Activations of one layer between forward and backward; None is computed again."""

    x: Activation  # (M, D)
    n1: Activation = None  # (M, D + R) what q, k, v read, with its LoRA
    heads: Activation = None  # (M, H of q and k, E) as projected, where a norm follows or DoRA learns
    attention: Activation = None  # q, k, v and the output, each (B, H, T, E), with their graph
    parked: ParkedAttention | None = None  # what attention keeps, where q, k and v are made again
    attended: Activation = None  # (B, H, T, E) the output for the tokens and heads that x has
    values: Activation = None  # (B, H, T, E) v for these, where DoRA learns
    z_o: Activation = None  # (M, R)
    given1: Activation = None  # (M, D) of o_proj, in the same cases
    x1: Activation = None  # (M, D)
    n2: Activation = None  # (M, D + R) what gate and up read, with its LoRA
    gate_up: Activation = None  # (M, U)
    z_down: Activation = None  # (M, R)
    given2: Activation = None  # (M, D) of down, in the same cases
    routed: Any = None  # of a mixture: model/mixture.py
    turns: tuple[Turn, ...] = field(default_factory=lambda: tuple(Turn() for _ in range(4)))  # q k v, o, gate up, down
    drops: Sequence[Drop] = (NOTHING, NOTHING)  # of what attention and MLP add
    dropout: float = 0.0  # of attention
    generator: torch.Tensor | None = None  # where it stood before that, for layers whose attention is computed again
    places: torch.Tensor | None = None  # the only rows, L of M, that are asked for: all behind attention has these
    num_rows: int = 0  # that all behind attention has: M, or L and some of zeros
    blocks: tuple[slice, ...] = ()  # of many rows, that gradients of the MLP's LoRA are summed in: see model/slices.py
    slices: tuple[slice, ...] = ()  # the same, where the MLP takes its rows in them, too
    row_group: RowGroup | None = None  # the workers that hold the rows in parts: `attention` has whole ones

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        """Those that are asked for, and zeros up to `num_rows`."""
        if self.places is None:
            return whole
        made, count = whole.new_empty(self.num_rows, whole.shape[1]), len(self.places)
        torch.index_select(whole, 0, self.places, out=made[:count])
        made[count:] = 0
        return made

    def all_rows(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """They among zeros."""
        if self.places is None:
            return rows
        return rows.new_zeros(count, rows.shape[1]).index_copy_(0, self.places, rows[: len(self.places)])


class Passed:
    """What one layer's backward leaves to the next one's: the buffer (M, D + room) that its gradient lies in."""

    buffer: torch.Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """What the layers of a model have in common."""

    stash: HostStash | None
    passed: Passed = field(default_factory=Passed)
    holders: Holders = field(default_factory=Holders)
