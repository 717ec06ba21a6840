"""A Llama-like decoder layer on a 4-bit base with LoRA as one autograd function: forward, backward, recomputation.

x1 = x + o_proj(attention(rotate(q), rotate(k), v)) with q, k, v of norm(x); y = x1 + down(silu(gate) x up) of norm(x1).
Nothing but activations is kept between forward and backward, and of those only what `Keep` says.
"""

# B rows, T tokens per row, M = B x T, D hidden width, E head size, I width of the MLP
from dataclasses import dataclass
from typing import Any

import torch

from qlora_ray.model.attention import attend
from qlora_ray.model.dropout import NOTHING, Drop, drop_of, probability_of
from qlora_ray.model.projection import Group, Single, member, ops_for
from qlora_ray.model.recompute import Keep
from qlora_ray.model.stash import HostStash


@dataclass
class Kept:
    """Activations of one layer between forward and backward; None is computed again."""

    x: torch.Tensor | None  # (M, D)
    n1: torch.Tensor | None = None  # (M, D + R) normalized input of q, k, v, with its LoRA
    inverse1: torch.Tensor | None = None  # (M,)
    attention: tuple[torch.Tensor, ...] | None = None  # q, k, v and the output, each (B, H, T, E), with their graph
    z_o: torch.Tensor | None = None  # (M, R)
    x1: torch.Tensor | None = None  # (M, D)
    n2: torch.Tensor | None = None  # (M, D + R) normalized input of gate and up, with its LoRA
    inverse2: torch.Tensor | None = None  # (M,)
    gate_up: torch.Tensor | None = None  # (M, 2 I)
    z_down: torch.Tensor | None = None  # (M, R)
    drops: tuple[Drop, ...] = (NOTHING,) * 4  # of what the LoRAs of q k v, o, gate up, down read


class Passed:
    """What one layer's backward leaves to the next one's: the buffer (M, D + room) that its gradient lies in."""

    buffer: torch.Tensor | None = None


class FusedLayer:
    """The arithmetic of one decoder layer. Holds modules, never their weights."""

    def __init__(self, layer: torch.nn.Module, index: int, stash: HostStash | None, passed: Passed):
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.qkv = Group([member(attention.q_proj), member(attention.k_proj), member(attention.v_proj)])
        self.out = Single(member(attention.o_proj))
        self.gate_up = Group([member(mlp.gate_proj), member(mlp.up_proj)], apart=True)
        self.down = Group([member(mlp.down_proj)], spare_rows=member(mlp.down_proj).rank)
        self.down_back = Single(member(mlp.down_proj), held_by=self.down)
        groups = (self.qkv, self.out, self.gate_up, self.down)
        self.loras = [next((m.lora for m in group.members if m.lora), None) for group in groups]
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_heads = [rows // self.head_dim for rows in self.qkv.rows]  # of q, k, v
        self.index, self.stash, self.passed, self.keep = index, stash, passed, Keep.ALL

    def parameters(self) -> list[torch.nn.Parameter]:
        """The LoRA matrices, in the order of `backward`'s gradients."""
        return [p for part in (self.qkv, self.out, self.gate_up, self.down) for p in part.parameters()]

    def hold_weights(self) -> None:
        """Keep the dequantized weights between steps: the same values without the work, for 2 bytes a weight."""
        for part in (self.qkv, self.out, self.gate_up, self.down):
            part.hold_weights = True

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None):
        """x (B, T, D), cos and sin (B or 1, T, E) -> (B, T, D)."""
        return _Layer.apply(x, self, cos, sin, mask, torch.is_grad_enabled(), *self.parameters())

    def draw(self) -> tuple[Drop, ...]:
        """Which values the LoRAs of each group shall not see in this micro-batch."""
        seed = torch.initial_seed()
        return tuple(drop_of(probability_of(lora), seed, 4 * self.index + i) for i, lora in enumerate(self.loras))

    def attention_part(self, kept: Kept, shape: torch.Size, angles, mask, with_graph: bool) -> None:
        """Fill in n1 and attention."""
        self.normalize_input(kept)
        if kept.attention is not None:
            return
        qkv = self.qkv.forward(kept.n1)  # (M, all heads x E)
        many, few, _ = self.num_heads
        ops_for(qkv.device).rotate(qkv[:, : (many + few) * self.head_dim].unflatten(1, (-1, self.head_dim)), *angles)
        heads = qkv.view(*shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        q, k, v = (part.detach().requires_grad_(with_graph) for part in heads.split(self.num_heads, 1))
        with torch.set_grad_enabled(with_graph):
            output = attend(q, k, v, mask, self.scaling)
        kept.attention = (q, k, v, output)

    def normalize_input(self, kept: Kept) -> None:
        """Fill in n1."""
        if kept.n1 is None:
            kept.n1 = self.qkv.buffer(kept.x)
            kept.inverse1 = self._normalize(0, kept.x, None, kept.n1, kept.drops[0])

    def residual_part(self, kept: Kept) -> None:
        """Fill in x1 and n2."""
        added = None
        if kept.x1 is None:
            output = kept.attention[3].detach().transpose(1, 2).flatten(2).flatten(0, 1)  # (M, H x E)
            added, kept.z_o = self.out.forward(output, kept.drops[1])
        if kept.n2 is None:
            kept.n2 = self.gate_up.buffer(kept.x)
            x = kept.x if added is not None else kept.x1
            kept.inverse2 = self._normalize(1, x, added, kept.n2, kept.drops[2])
        if added is not None:
            kept.x1 = added  # the norm has added x to it in place

    def mlp_part(self, kept: Kept) -> torch.Tensor:
        """Fill in gate_up and z_down; return the layer's output (M, D)."""
        kept.gate_up = self.gate_up.forward(kept.n2)
        h = self.down.buffer(kept.gate_up)  # (M, I + R)
        ops_for(h.device).swiglu(kept.gate_up, h[:, : self.down.inputs])
        self.down.fill(h, kept.drops[3])
        y = self.down.forward(h)
        kept.z_down = h[:, self.down.inputs :].clone() if self.down.rank else None
        return y.add_(kept.x1)

    def complete(self, kept: Kept, shape: torch.Size, angles, mask) -> None:
        """Compute again what was not kept."""
        self.attention_part(kept, shape, angles, mask, with_graph=True)
        self.residual_part(kept)
        if kept.gate_up is None:
            kept.gate_up = self.gate_up.forward(kept.n2)

    def thin_out(self, kept: Kept) -> None:
        """Drop what `keep` does not name."""
        if self.keep >= Keep.PRODUCTS:
            kept.n1 = kept.n2 = None
        if self.keep >= Keep.ATTENTION:
            kept.gate_up = None
        if self.keep >= Keep.INPUT:
            kept.attention = kept.x1 = kept.z_o = None
        if self.keep >= Keep.HOST and self.stash is not None:
            self.stash.put(self.index, kept.x)
            kept.x = None

    def backward(self, kept: Kept, dy: torch.Tensor, shape: torch.Size, angles, mask) -> tuple[Any, ...]:
        """Gradients of x and of the LoRA matrices. dy (M, D); empties `kept` on the way."""
        if kept.x is None:
            kept.x = self.stash.take(self.index)
        self.complete(kept, shape, angles, mask)
        ops = ops_for(dy.device)
        width, buffer = dy.shape[1], self._with_room(dy)
        h, dz = self.down_back.input_gradient(buffer, kept.drops[3])  # dh (M, I)
        ops.swiglu_backward(h, kept.gate_up)  # dh becomes h, gate_up its gradient
        of_down = self.down_back.parameter_gradients(dy, dz, h, kept.z_down, kept.drops[3])
        del h, dz, buffer
        of_gate_up, buffer1 = self._through_group(1, kept, kept.gate_up, dy)
        dx1 = buffer1[:, :width]
        kept.gate_up = kept.n2 = kept.x1 = None
        q, k, v, output = kept.attention
        flat = output.detach().transpose(1, 2).flatten(2).flatten(0, 1)  # (M, H x E)
        d_output, dz = self.out.input_gradient(buffer1, kept.drops[1])
        of_out = self.out.parameter_gradients(dx1, dz, flat, kept.z_o, kept.drops[1])
        d_output = d_output.view(*shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        dq, dk, dv = torch.autograd.grad(output, (q, k, v), d_output)
        d_qkv = dy.new_empty(dy.shape[0], sum(self.qkv.rows))
        ops.rotate_backward(dq, dk, dv, *angles, d_qkv)
        del q, k, v, output, flat, d_output, dq, dk, dv
        kept.attention = None
        of_qkv, buffer = self._through_group(0, kept, d_qkv, dx1)
        self.passed.buffer = buffer if self.index else None
        return buffer[:, :width], *of_qkv, *of_out, *of_gate_up, *of_down

    def _with_room(self, dy: torch.Tensor) -> torch.Tensor:
        """The buffer that dy lies in if the layer above made it, else a copy with as much room."""
        rows, width = dy.shape
        buffer, self.passed.buffer = self.passed.buffer, None
        shape = (rows, width + self.down_back.room)
        if buffer is not None and buffer.shape == shape and buffer.data_ptr() == dy.data_ptr():
            return buffer
        buffer = dy.new_empty(shape)
        buffer[:, :width] = dy
        return buffer

    def _normalize(self, which: int, x, added, buffer: torch.Tensor, drop: Drop) -> torch.Tensor:
        norm, group = self.norms[which], (self.qkv, self.gate_up)[which]
        out = buffer[:, : group.inputs]
        inverse = ops_for(x.device).rms_norm(x, added, norm.weight.data, norm.variance_epsilon, out)
        group.fill(buffer, drop)
        return inverse

    def _through_group(self, which: int, kept: Kept, d_out: torch.Tensor, residual: torch.Tensor):
        """Back through the projections behind a norm, and the norm: (LoRA gradients, gradient of x with room)."""
        group, room = ((self.qkv, self.down_back.room), (self.gate_up, self.out.room))[which]
        x, inverse, buffer = ((kept.x, kept.inverse1, kept.n1), (kept.x1, kept.inverse2, kept.n2))[which]
        drop, weight = kept.drops[2 * which], self.norms[which].weight.data
        both = group.backward(d_out, drop)
        gradients = group.parameter_gradients(d_out, both[:, group.inputs :], buffer, drop)
        dx = x.new_empty(x.shape[0], x.shape[1] + room)
        ops_for(x.device).rms_norm_backward(
            both[:, : group.inputs], x, weight, inverse, residual, dx[:, : group.inputs]
        )
        return gradients, dx


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fused: FusedLayer, cos, sin, mask, with_graph: bool, *parameters):
        angles = (cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]))  # (T or M, E)
        kept = Kept(x.reshape(-1, x.shape[-1]), drops=fused.draw())
        fused.attention_part(kept, x.shape, angles, mask, with_graph and fused.keep < Keep.INPUT)
        fused.residual_part(kept)
        y = fused.mlp_part(kept)
        if with_graph:
            fused.thin_out(kept)
            ctx.kept, ctx.fused, ctx.shape, ctx.angles, ctx.mask = kept, fused, x.shape, angles, mask
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        kept, ctx.kept = ctx.kept, None
        flat = dy.reshape(-1, dy.shape[-1])
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        dx, *gradients = ctx.fused.backward(kept, flat, ctx.shape, ctx.angles, ctx.mask)
        return dx.view(ctx.shape), None, None, None, None, None, *gradients
