"""A decoder layer on a 4-bit base with LoRA as one autograd function: forward, backward, recomputation.

x1 = x + m post1(o_proj(attention(q, k, v))) with q, k, v of pre1(x); y = x1 + m post2(down(activation(gate) x up)) with
gate and up of pre2(x1), or of activation(up) alone. Which norms there are, and what else differs between model types,
says its `Family` (model/layer_parts.py). Nothing but activations is kept between forward and backward, and of those
only what `Keep` says.
"""

# B rows, T tokens per row, M = B x T, D hidden width, E head size, I width of the MLP, U = 2 I with a gate, else I
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from qlora_ray.model import slices
from qlora_ray.model.attention import attend
from qlora_ray.model.dropout import (
    drawing_from,
    drop_of,
    generator_state,
    probability_in,
    probability_of,
)
from qlora_ray.model.kept import Kept
from qlora_ray.model.layer_parts import LayerParts
from qlora_ray.model.member import Turn
from qlora_ray.model.ops import ops_for
from qlora_ray.model.ops_plain import Angles
from qlora_ray.model.parked import ParkedAttention, input_slot
from qlora_ray.model.recompute import Keep
from qlora_ray.model.traits import own_dropout

# Rows that are asked for alone, in multiples: with as many as there are labels, each micro-batch would have shapes of
# its own, for which a GPU has to find kernels and memory first.
NUM_TOGETHER = {"cuda": 256}


class FusedLayer(LayerParts):
    """The arithmetic of one decoder layer. Holds modules, never their weights."""

    takes_slices = True  # of long rows, in its MLP
    takes_zeros = True  # among its rows

    def __call__(self, x: torch.Tensor, turned: tuple[torch.Tensor, torch.Tensor] | None, mask: torch.Tensor | None):
        """x (B, T, D), turned by cos and sin (B or 1, T, E) -> (B, T, D), or (1, L, D) of `places` and then zeros."""
        return _Layer.apply(x, self, self.angles(turned), mask, torch.is_grad_enabled(), *self.parameters())

    def begin(self, x: torch.Tensor) -> Kept:
        """Of a micro-batch x (B, T, D): its rows, who holds them, and what is to be dropped of them."""
        seed, numbers = torch.initial_seed(), self.holders.numbers
        num_rows = self._num_rows(x.shape[0] * x.shape[1], x.device.type)
        behind = numbers
        if self.place_numbers is not None:
            behind = F.pad(self.place_numbers, (0, num_rows - len(self.place_numbers)))
        read = enumerate(zip(self.loras, (numbers, behind, behind, behind), strict=True))
        return Kept(
            x.reshape(-1, x.shape[-1]), places=self.places, num_rows=num_rows, row_group=self.holders.row_group,
            turns=tuple(Turn(drop_of(probability_of(one), seed, 4 * self.index + i, rows)) for i, (one, rows) in read),
            drops=[
                drop_of(probability_in(own), seed, OWN_PLACE + 2 * self.index + i, behind)
                for i, own in enumerate(self.drops)
            ],
            dropout=own_dropout(self.attention) if self.attention.training else 0.0,
        )  # fmt: skip

    def _num_rows(self, count: int, device_type: str) -> int:
        """Rows behind attention, of `count` before it."""
        if self.places is None:
            return count
        together = NUM_TOGETHER.get(device_type, 1) if self.takes_zeros else 1
        more = -(-len(self.places) // together) * together
        return more if more < count else len(self.places)

    def angles(self, turned: tuple[torch.Tensor, torch.Tensor] | None) -> Angles | None:
        """How queries and keys are rotated; None where this layer does not."""
        if turned is None or not self.rotates:
            return None
        cos, sin = (part.reshape(-1, part.shape[-1]) for part in turned)  # (T or M, 2 F), all layers' own
        if self.family.halves_angles:
            cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
        return Angles(cos, sin, self.family.interleaved)

    def attention_part(self, kept: Kept, shape: torch.Size, angles: Angles | None, mask, with_graph: bool) -> None:
        """Fill in n1, heads and attention."""
        if kept.n1 is None:
            kept.n1 = self._read(0, kept.x, None, kept.turns[0])
        if kept.attention is not None:
            return
        qkv = self.qkv.forward(kept.n1, kept.turns[0]).unflatten(1, (-1, self.head_dim))  # (M, all heads, E)
        turning = qkv[:, : -self.num_heads[2]]
        if self.head_norms:
            kept.heads, turning = turning, torch.empty_like(turning, memory_format=torch.contiguous_format)
            for norm, part, out in self._norms_of_heads(kept.heads, turning):
                ops_for(part.device).norm_groups(part, norm, out)
        elif self.learns_lengths[0]:
            kept.heads = turning.clone()
        if angles is not None:
            ops_for(qkv.device).rotate(turning, angles)
        rows = (part.view(*shape[:2], *part.shape[1:]).transpose(1, 2) for part in (turning, qkv))  # (B, H, T, E)
        turned, every = rows
        many, few, _ = self.num_heads
        parts: tuple[torch.Tensor, ...] = (turned[:, :many], turned[:, many:], every[:, many + few :])
        kept.values = parts[2] if self.learns_lengths[0] else None
        if kept.row_group:
            parts = kept.row_group.to_heads(*parts)
        q, k, v = (part.detach().requires_grad_(with_graph) for part in parts)
        sight = replace(self.sight, dropout=kept.dropout)
        if kept.parked is not None:
            output = kept.parked.come_back(q, k, v)
        elif with_graph and self.keep == Keep.PARKED:
            kept.parked = ParkedAttention(self.index, self.stash)
            output = kept.parked.forward(lambda q, k, v: attend(q, k, v, mask, sight), q, k, v)
        else:
            if kept.dropout and not with_graph and self.keep >= Keep.INPUT:
                kept.generator = generator_state(q.device)
            again = kept.generator if with_graph else None
            with torch.set_grad_enabled(with_graph), drawing_from(again, q.device):
                output = attend(q, k, v, mask, sight)
        kept.attention, kept.attended = (q, k, v, output), output.detach()
        if kept.row_group:
            kept.attended = kept.row_group.to_tokens(kept.attended)

    def residual_part(self, kept: Kept) -> None:
        """Fill in given1, x1 and, where the MLP takes all rows at once, n2."""
        added = None
        if kept.x1 is None:
            if kept.given1 is None:
                output = kept.rows(kept.attended.transpose(1, 2).flatten(2).flatten(0, 1))  # (M, H x E)
                kept.given1, kept.z_o = self.out.forward(output, kept.turns[1])
            added = self._given(0, kept, kept.given1)
            if not self.keeps_given[0]:
                kept.given1 = None
        if kept.slices:
            kept.x1 = kept.x1 if added is None else added.add_(kept.rows(kept.x))
            return
        if kept.n2 is None:
            kept.n2 = self._read(1, kept.rows(kept.x) if added is not None else kept.x1, added, kept.turns[2])
        if added is not None:
            kept.x1 = added

    def read_mlp(self, kept: Kept) -> torch.Tensor:
        """What gate and up read, of x1."""
        return self._read(1, kept.x1, None, kept.turns[2])

    def mlp_part(self, kept: Kept, with_graph: bool) -> torch.Tensor:
        """Fill in what the MLP leaves, and given2; return the layer's output (M, D)."""
        if kept.slices:
            return slices.mlp_part(self, kept, with_graph)
        kept.given2 = self.mlp_forward(kept, with_graph)
        y = self._given(1, kept, kept.given2)
        if not self.keeps_given[1]:
            kept.given2 = None
        return y.add_(kept.x1)

    def mlp_forward(self, kept: Kept, with_graph: bool) -> torch.Tensor:
        """What the MLP makes of n2, (M, D). Fill in gate_up and z_down."""
        kept.gate_up = self.gate_up.forward(kept.n2, kept.turns[2], kept.gate_up)
        h = self._hidden(kept)
        inputs, rank = self.down.inputs, self.down.members[0].rank
        kept.z_down = h[:, inputs : inputs + rank].clone() if rank else None
        return self.down.forward(h, kept.turns[3])

    def _hidden(self, kept: Kept) -> torch.Tensor:
        """What down reads, with its LoRA: (M, I + R)."""
        h = self.down.buffer(kept.gate_up)
        ops_for(h.device).activate(kept.gate_up, self.is_gelu, h[:, : self.down.inputs])
        self.down.fill(h, kept.turns[3])
        return h

    def complete(self, kept: Kept, shape: torch.Size, angles: Angles | None, mask) -> None:
        """Compute again what was not kept."""
        self.attention_part(kept, shape, angles, mask, with_graph=True)
        self.residual_part(kept)
        if not kept.slices:
            self.complete_mlp(kept)

    def complete_mlp(self, kept: Kept) -> None:
        """Compute again what was not kept behind n2."""
        if kept.gate_up is None:
            kept.gate_up = self.gate_up.forward(kept.n2, kept.turns[2])
        if kept.given2 is None and self.keeps_given[1]:
            kept.given2 = self.down.forward(self._hidden(kept), kept.turns[3])

    def thin_out(self, kept: Kept) -> None:
        """Drop what `keep` does not name."""
        if self.keep >= Keep.PRODUCTS:
            kept.n1 = kept.n2 = None
        if self.keep >= Keep.ATTENTION:
            kept.gate_up = None
        if self.keep >= Keep.PARKED:
            kept.attention = kept.attended = kept.values = kept.heads = None
            kept.x1 = kept.z_o = kept.given1 = kept.given2 = None
        if kept.parked is not None:
            kept.parked.let_go()
        if self.stash is None:
            return
        if self.keep in (Keep.PARKED, Keep.HOST):
            self.stash.put(input_slot(self.index), kept.x)
            kept.x = None
        else:
            self.stash.let_go()  # of what layers before it have put

    def backward(self, kept: Kept, dy: torch.Tensor, shape: torch.Size, angles, mask) -> tuple[Any, ...]:
        """Gradients of x and of the LoRA matrices. dy (M, D); empties `kept` on the way."""
        if self.before_backward:
            self.before_backward()
        if kept.x is None:
            assert self.stash is not None
            kept.x = self.stash.take(input_slot(self.index))
        self.complete(kept, shape, angles, mask)
        ops = ops_for(dy.device)
        width = dy.shape[1]
        of_mlp, buffer1 = self.mlp_backward(kept, dy)
        kept.gate_up = kept.n2 = kept.x1 = None
        d_given = self.back_to_given(0, kept, kept.given1, buffer1)
        self._learn_from(1, kept, kept.given1)
        kept.given1 = None
        q, k, v, output = kept.attention
        flat = kept.rows(kept.attended.transpose(1, 2).flatten(2).flatten(0, 1))  # (M, H x E)
        d_output, dz = self.out.input_gradient(d_given, kept.turns[1])
        of_out = self.out.parameter_gradients(d_given[:, :width], dz, flat, kept.z_o, kept.turns[1])
        kept.turns[1].given = kept.attended = None
        del d_given, dz, flat  # of a long row, gradients of attention take more than all that is kept
        d_output = kept.all_rows(d_output, shape[0] * shape[1])
        d_output = d_output.view(*shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        if kept.row_group:
            d_output = kept.row_group.to_heads_alone(d_output)
        if kept.parked is not None:
            dq, dk, dv = kept.parked.backward(d_output)
        else:
            dq, dk, dv = torch.autograd.grad(output, (q, k, v), d_output)
        kept.attention = kept.parked = None
        del q, k, v, output, d_output
        if kept.row_group:
            dq, dk, dv = kept.row_group.to_tokens_of_all(dq, dk, dv, self.num_heads[1])
        d_qkv = dy.new_empty(shape[0] * shape[1], sum(self.qkv.rows))
        ops.rotate_backward(dq, dk, dv, angles, d_qkv)
        if self.head_norms:
            d_heads = d_qkv.unflatten(1, (-1, self.head_dim))[:, : -self.num_heads[2]]
            for norm, grad, part in self._norms_of_heads(d_heads, kept.heads):
                ops.norm_groups_backward(grad, part, norm)
        if self.learns_lengths[0]:
            values = kept.values.transpose(1, 2).flatten(2).flatten(0, 1)  # (M, H of v x E)
            self._learn_from(0, kept, torch.cat((kept.heads.flatten(1), values), 1))
        del dq, dk, dv
        kept.values = kept.heads = None
        past = kept.all_rows(buffer1[:, :width], shape[0] * shape[1])
        of_qkv, buffer = self._through_group(0, kept, d_qkv, past)
        self.passed.buffer = buffer if self.index else None
        return buffer[:, :width], *of_qkv, *of_out, *of_mlp

    def mlp_backward(self, kept: Kept, dy: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Gradients of the MLP's LoRA matrices, and of x1 with room. dy (M, D)."""
        through = slices.through_mlp if kept.slices else FusedLayer.through_mlp
        return through(self, kept, self.with_room(dy))

    def through_mlp(self, kept: Kept, buffer: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The same; buffer (M, D + room) holds dy."""
        width, turn = self.qkv.inputs, kept.turns[3]
        d_given = self.back_to_given(1, kept, kept.given2, buffer)
        self._learn_from(3, kept, kept.given2)
        kept.given2 = None
        h, dz = self.down_back.input_gradient(d_given, turn)  # dh (M, I)
        self._learn_from(2, kept, kept.gate_up)
        d_gate_up = torch.empty_like(kept.gate_up) if self.learns_lengths[2] else kept.gate_up
        ops_for(h.device).activate_backward(h, kept.gate_up, self.is_gelu, d_gate_up)  # dh becomes h
        read = (d_given[:, :width], dz, h, kept.z_down)
        of_down = slices.summed(kept.blocks, self.down_back.parameter_gradients, turn, *read)
        turn.given = None
        del h, dz, d_given, read
        of_gate_up, buffer1 = self._through_group(1, kept, d_gate_up, buffer[:, :width])
        return [*of_gate_up, *of_down], buffer1


OWN_PLACE = 2**30  # of a layer's own dropout, in the masks: those of its LoRAs come before


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fused: FusedLayer, angles: Angles | None, mask, with_graph: bool, *parameters):
        kept = fused.begin(x)
        kept.blocks = slices.of_rows(kept.num_rows, x.shape[1])
        if fused.takes_slices:
            kept.slices = kept.blocks
        fused.attention_part(kept, x.shape, angles, mask, with_graph and fused.keep < Keep.INPUT)
        fused.residual_part(kept)
        y = fused.mlp_part(kept, with_graph)
        if with_graph:
            fused.thin_out(kept)
            ctx.kept, ctx.fused, ctx.shape, ctx.angles, ctx.mask = kept, fused, x.shape, angles, mask
        return y.view(x.shape) if kept.places is None else y[None]

    @staticmethod
    def backward(ctx, dy):
        kept, ctx.kept = ctx.kept, None
        flat = dy.reshape(-1, dy.shape[-1])
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        dx, *gradients = ctx.fused.backward(kept, flat, ctx.shape, ctx.angles, ctx.mask)
        return dx.view(ctx.shape), None, None, None, None, *gradients
