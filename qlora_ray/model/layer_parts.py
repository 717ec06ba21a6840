"""What a decoder layer is made of, and the ways that attention and MLP have in common, there and back.

Between the residual stream and projections: what is read of it through a norm, and what is added to it through another.
"""

# B rows, T tokens per row, M = B x T, D hidden width, E head size, I width of the MLP, U = 2 I with a gate, else I
from collections.abc import Callable
from typing import Any

import torch

from qlora_ray.model import slices
from qlora_ray.model.families import Family
from qlora_ray.model.kept import Kept, Shared
from qlora_ray.model.member import Turn, member
from qlora_ray.model.norm import norm_of
from qlora_ray.model.ops import ops_for
from qlora_ray.model.projection import Group, Single
from qlora_ray.model.recompute import Keep
from qlora_ray.model.traits import GELU_BY_TANH, activation_of, sight_of


class LayerParts:
    """The modules of one decoder layer, and what is done around its projections. Holds modules, never their weights."""

    def __init__(self, layer: torch.nn.Module, family: Family, index: int, shared: Shared):
        attention: Any = getattr(layer, family.attention)
        self.family, self.attention = family, attention
        self.before, self.after = (
            tuple(getattr(layer, name) if name else None for name in names) for names in (family.before, family.after)
        )
        has_norms = bool(family.norm_of_heads) and hasattr(attention, "q_norm")
        self.head_norms = (attention.q_norm, attention.k_norm) if has_norms else None
        self.drops = [layer.get_submodule(name) if name else None for name in family.drops]
        self.factor = float(getattr(layer, "residual_multiplier", 1.0))  # of what attention and MLP add
        assert self.factor == 1 or not any(self.after), "a norm would come between a product and its factor"
        self.qkv = Group([member(getattr(attention, name)) for name in family.qkv])
        self.out = Single(member(getattr(attention, family.out), self.factor))
        self.take_mlp(layer.mlp)
        groups = (self.qkv, self.out, self.gate_up, self.down)
        self.learns_lengths = [any(m.magnitude for m in group.members) for group in groups]
        self.keeps_given = [bool(norm) or self.learns_lengths[i] for norm, i in zip(self.after, (1, 3), strict=True)]
        self.loras = [next((m.lora for m in group.members if m.lora), None) for group in groups]
        self.head_dim, self.sight = attention.head_dim, sight_of(attention)
        many = self.out.shape[1] // self.head_dim
        few = (sum(self.qkv.rows) // self.head_dim - many) // 2
        self.num_heads = [many, few, few]  # of q, k, v
        self.rotates = bool(getattr(attention, "use_rope", family.rotates))
        self.index, self.stash, self.passed, self.keep = index, shared.stash, shared.passed, Keep.ALL
        self.holders = shared.holders
        self.before_backward: Callable[[], None] | None = None  # has the weights there, where they are not always
        self.places: torch.Tensor | None = None  # the only rows that the next forward is to return; None: all
        self.place_numbers: torch.Tensor | None = None  # of them among all such, where the rows are parts: (L,) int32

    def take_mlp(self, mlp: Any) -> None:
        """Find the MLP's projections."""
        self.gate_up: Any = Group([member(getattr(mlp, name)) for name in self.family.gate_up], apart=True)
        down = member(getattr(mlp, self.family.down), self.factor)
        self.down: Any = Group([down], spare_rows=down.rank)
        self.down_back = Single(down, held_by=self.down)
        self.room = self.down_back.room  # beside the gradient of what the layer returns
        self.is_gelu = activation_of(mlp) in GELU_BY_TANH

    def parameters(self) -> list[torch.nn.Parameter]:
        """The LoRA matrices, in the order of `backward`'s gradients."""
        return [p for part in (self.qkv, self.out, self.gate_up, self.down) for p in part.parameters()]

    def hold_weights(self) -> None:
        """Keep the dequantized weights between steps: the same values without the work, for 2 bytes a weight."""
        assert not any(self.learns_lengths), "DoRA multiplies weights by other gains at each step"
        for part in (self.qkv, self.out, self.gate_up, self.down):
            part.hold_weights = True

    def _norms_of_heads(self, *heads: torch.Tensor):
        """For queries and for keys their norm, and their part of each of `heads` as the groups that it takes."""
        many, few, _ = self.num_heads
        for module, start, count in zip(self.head_norms or (), (0, many), (many, few), strict=True):
            parts = [rows[:, start : start + count] for rows in heads]
            if self.family.norm_of_heads == "width":
                parts = [part.flatten(1).unsqueeze(1) for part in parts]
            yield norm_of(module, self.family), *parts

    def _read(self, which: int, x: torch.Tensor, added: torch.Tensor | None, turn: Turn) -> torch.Tensor:
        """What attention or MLP reads of x + added, with its LoRA: (M, D + R). `added` becomes x + added."""
        norm, group = self.before[which], (self.qkv, self.gate_up)[which]
        buffer = group.buffer(x)
        out = buffer[:, : group.inputs]
        if norm is not None:
            ops_for(x.device).norm_rows(x, added, norm_of(norm, self.family), out)
        else:
            out.copy_(x if added is None else added.add_(x))
        group.fill(buffer, turn)
        return buffer

    def _through_group(self, which: int, kept: Kept, d_out: torch.Tensor, residual: torch.Tensor):
        """Back through the projections behind a norm, and the norm: (LoRA gradients, gradient of x with room)."""
        group, room = ((self.qkv, self.room), (self.gate_up, self.out.room))[which]
        x, buffer = ((kept.x, kept.n1), (kept.x1, kept.n2))[which]
        turn, norm = kept.turns[2 * which], self.before[which]
        both = group.backward(d_out, turn)
        blocks = kept.blocks if group is self.gate_up else ()
        gradients = slices.summed(blocks, group.parameter_gradients, turn, d_out, both[:, group.inputs :], buffer)
        turn.given = None
        dx = x.new_empty(x.shape[0], x.shape[1] + room)
        back, out = both[:, : group.inputs], dx[:, : group.inputs]
        if norm is None:
            torch.add(back, residual, out=out)
        else:
            ops_for(x.device).norm_rows_backward(back, x, norm_of(norm, self.family), residual, out)
        return gradients, dx

    def _given(self, which: int, kept: Kept, given: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream of what attention or MLP gives: (M, D), in place if that is not kept."""
        norm, drop, ops = self.after[which], kept.drops[which], ops_for(given.device)
        if norm is not None:
            out = torch.empty_like(given)
            ops.norm_rows(given, None, norm_of(norm, self.family), out)
            given = out
        elif self.keeps_given[which]:
            given = given.clone()
        if drop.probability:
            ops.drop_values(given, drop, given)
        return given

    def _learn_from(self, which: int, kept: Kept, given: torch.Tensor | None) -> None:
        """Hand what a group's projections gave to the gradient of their lengths, where they learn those."""
        if self.learns_lengths[which]:
            kept.turns[which].given = given

    def back_to_given(self, which: int, kept: Kept, given: torch.Tensor | None, buffer: torch.Tensor) -> torch.Tensor:
        """Gradient of what attention or MLP gives, with room, of that of what it adds: the same without norm or drop.

        The buffers (M, D + room) hold a gradient.
        """
        norm, drop, ops = self.after[which], kept.drops[which], ops_for(buffer.device)
        if norm is None and not drop.probability:
            return buffer
        made = torch.empty_like(buffer)
        grad, out = (part[:, : self.qkv.inputs] for part in (buffer, made))
        if drop.probability:
            ops.drop_values(grad, drop, out)
            grad = out
        if norm is not None:
            ops.norm_rows_backward(grad, given, norm_of(norm, self.family), None, out)
        return made

    def with_room(self, dy: torch.Tensor) -> torch.Tensor:
        """The buffer that dy lies in if the layer above made it, else a copy with as much room."""
        rows, width = dy.shape
        buffer, self.passed.buffer = self.passed.buffer, None
        shape = (rows, width + self.room)
        if buffer is not None and buffer.shape == shape and buffer.data_ptr() == dy.data_ptr():
            return buffer
        buffer = dy.new_empty(shape)
        buffer[:, :width] = dy
        return buffer
