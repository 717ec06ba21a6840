"""Element-wise steps of a fused decoder layer in plain PyTorch: the reference, and what CPUs run.

Their gradients are written out; `ops_triton` does the same with one kernel each. Rounding follows transformers.
"""

# M tokens (rows x length), D hidden width, I width of the MLP, H heads of E values, G groups of W, V vocabulary;
# of a projection K inputs, n outputs, r rank, and R of all in its group
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qlora_ray.libraries import Patch
from qlora_ray.model.dropout import Drop, kept
from qlora_ray.model.norm import Norm

# GELU by tanh (arXiv:1606.08415): x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which is
# x sigmoid(GELU x (1 + GELU_CUBE x^2)).
GELU, GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
ROWS_AT_ONCE = 1024  # of a weight in float32

PACKED_FORMAT = Patch(
    "bitsandbytes", "0.50.2", "reads quant_state (absmax, code, offset, state2) and the order of packed values, here "
    "and in ops_triton/weights.py",
    gains="a weight is unpacked by one kernel, to where the product reads it, instead of by two and a copy",
    delete_when="dequantize_4bit writes into a slice of a buffer",
)  # fmt: skip


@dataclass(frozen=True)
class Angles:
    """Of rotary embedding: cos and sin (M or a divisor of it, 2 F), each value twice; and what is rotated together."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False  # neighbours, else values half of 2 F apart


@dataclass(frozen=True)
class Placed:
    """B (n, r) of a LoRA with its factor, where its columns begin among those of a group, and what its rows have."""

    b: torch.Tensor
    scale: float
    column: int
    gain: torch.Tensor | None = None  # (n,) float32


def dequantize(weight: torch.Tensor, gain: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write a bitsandbytes 4-bit weight into `out`, (n, K) in the compute dtype, any row stride.

    Its rows are multiplied by gains (n,) where there are such.
    """
    from bitsandbytes.functional import dequantize_4bit

    whole = dequantize_4bit(weight.data.reshape(-1, 1), weight.quant_state)  # type: ignore[attr-defined]
    out.copy_(whole.view(out.shape))
    if gain is not None:
        out.mul_(gain[:, None])


def row_lengths(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Norm of each row of W + scale B A, W a bitsandbytes 4-bit weight in the dtype of A (r, K): (n,) float32."""
    whole = a.new_empty(b.shape[0], a.shape[1])
    dequantize(weight, None, whole)
    parts = zip(whole.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
    wholes = (torch.addmm(rows.float(), low.float(), a.float(), alpha=scale) for rows, low in parts)
    return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).float() for rows in wholes])


def place(placed: Placed | None, out: torch.Tensor) -> None:
    """Write scale x gain x B into its columns of out (n, R), and 0 into the others."""
    out.zero_()
    if placed is None:
        return
    target = out[:, placed.column : placed.column + placed.b.shape[1]]
    torch.mul(placed.b, placed.scale, out=target)
    if placed.gain is not None:
        target.mul_(placed.gain[:, None])


def norm_rows(x: torch.Tensor, added: torch.Tensor | None, norm: Norm, out: torch.Tensor) -> None:
    """out (M, D) = the norm of x + added. `added` becomes x + added."""
    out.copy_(_normalized(x if added is None else added.add_(x), norm))


def norm_rows_backward(
    grad: torch.Tensor, x: torch.Tensor, norm: Norm, residual: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out: gradient of x (M, D), plus the gradient that reaches x past the norm."""
    dx = _norm_gradient(grad, x, norm)
    out.copy_(dx if residual is None else dx + residual.float())


def norm_groups(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    """out = the norm of each of the groups of x, both (M, G, W)."""
    out.copy_(_normalized(x, norm))


def norm_groups_backward(grad: torch.Tensor, x: torch.Tensor, norm: Norm) -> None:
    """Back from grad (M, G, W), in place."""
    grad.copy_(_norm_gradient(grad, x, norm))


def _normalized(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    wide = _centered(x.float(), norm)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    made = _gain(norm) * (wide.to(x.dtype).float() if norm.rounds_first else wide)
    return made if norm.bias is None else made + norm.bias.float()


def _norm_gradient(grad: torch.Tensor, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    wide, value = grad.float() * _gain(norm), _centered(x.float(), norm)
    inverse = torch.rsqrt(value.square().mean(-1, keepdim=True) + norm.eps)
    normalized = value * inverse
    return inverse * (_centered(wide, norm) - normalized * (wide * normalized).mean(-1, keepdim=True))


def _centered(wide: torch.Tensor, norm: Norm) -> torch.Tensor:
    return wide - wide.mean(-1, keepdim=True) if norm.centers else wide


def _gain(norm: Norm) -> torch.Tensor:
    return norm.weight.float() + norm.plus_one


def rotate(heads: torch.Tensor, angles: Angles) -> None:
    """Rotary embedding (arXiv:2104.09864) in place: heads (M, H, E), of which the first 2 F values are rotated."""
    repeats = heads.shape[0] // angles.cos.shape[0]
    cos, sin = (part.repeat(repeats, 1)[:, None, : part.shape[1] // 2] for part in (angles.cos, angles.sin))
    size = 2 * cos.shape[-1]  # cos and sin (M, 1, F)
    first, second = _pairs(heads[..., :size], angles.interleaved)
    one, other = first * cos - second * sin, second * cos + first * sin
    first.copy_(one)
    second.copy_(other)


def _pairs(heads: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that are rotated together, as views."""
    if interleaved:
        return heads[..., 0::2], heads[..., 1::2]
    half = heads.shape[-1] // 2
    return heads[..., :half], heads[..., half:]


def rotate_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, angles: Angles | None, out: torch.Tensor
) -> None:
    """Write the gradients of q, k (before rotation) and v, each (B, H, T, E), side by side: (M, all heads x E)."""
    rows = [part.transpose(1, 2).reshape(out.shape[0], -1, part.shape[-1]) for part in (dq, dk, dv)]  # (M, H, E)
    heads = torch.cat(rows, 1)
    if angles is not None:
        rotate(heads[:, : -rows[2].shape[1]], Angles(angles.cos, -angles.sin, angles.interleaved))
    out.copy_(heads.flatten(1))


def activate(read: torch.Tensor, is_gelu: bool, out: torch.Tensor) -> None:
    """out (M, I) = activation(gate) x up of gate and up side by side, (M, 2 I), or activation(read) of (M, I).

    The activation is SiLU, or GELU's approximation by tanh.
    """
    gate, up = _gate_and_up(read, out)
    active = F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)
    out.copy_(active if up is None else active * up)


def activate_backward(grad: torch.Tensor, read: torch.Tensor, is_gelu: bool, out: torch.Tensor) -> None:
    """Back from grad (M, I), which becomes what `activate` returned; out: the gradient of read, which it may be."""
    gate, up = _gate_and_up(read, grad)
    gate = gate.float()
    inner, slope = gate, torch.ones_like(gate)  # both activations are gate x sigmoid(inner)
    if is_gelu:
        inner = GELU * gate * (1 + GELU_CUBE * gate.square())
        slope = GELU * (1 + 3 * GELU_CUBE * gate.square())
    sigmoid = inner.sigmoid()
    active = (gate * sigmoid).to(grad.dtype)
    wide = grad.float()
    of_active = wide if up is None else wide * up.float()
    dgate = of_active * sigmoid * (1 + gate * slope * (1 - sigmoid))
    made = dgate if up is None else torch.cat((dgate, wide * active.float()), -1)
    grad.copy_(active if up is None else active * up)
    out.copy_(made)


def _gate_and_up(read: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    width = like.shape[1]
    return read[:, :width], read[:, width:] if read.shape[1] > width else None


def drop_values(x: torch.Tensor, drop: Drop, out: torch.Tensor) -> None:
    """out = what is kept of x, both (M, D); it may be x."""
    out.copy_(_dropped(x, drop))


def activate_backward_with_dots(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """As `activate_backward` of SiLU; returns <grad, what `activate` returned> of each row: (M,) float32."""
    before = grad.clone()
    activate_backward(grad, gate_up, False, gate_up)
    return (before.float() * grad.float()).sum(-1)


@dataclass(frozen=True)
class Clamp:
    """Of gpt_oss's gate: (up + 1) x gate x sigmoid(alpha x gate), both clamped, which lie by turns."""

    alpha: float
    limit: float


def clamped_glu(gate_up: torch.Tensor, clamp: Clamp, out: torch.Tensor) -> None:
    """out (M, I) of gate_up (M, 2 I)."""
    gate, up = _clamped(gate_up, clamp)
    out.copy_((up + 1) * gate * (clamp.alpha * gate).sigmoid())


def clamped_glu_backward(grad: torch.Tensor, gate_up: torch.Tensor, clamp: Clamp) -> torch.Tensor:
    """Back from grad (M, I), in place, as `activate_backward_with_dots`."""
    gate, up = _clamped(gate_up, clamp)
    sigmoid, wide = (clamp.alpha * gate).sigmoid(), grad.float()
    is_free = (gate_up[:, ::2] <= clamp.limit, gate_up[:, 1::2].abs() <= clamp.limit)
    dgate = wide * (up + 1) * sigmoid * (1 + clamp.alpha * gate * (1 - sigmoid))
    gate_up[:, 1::2] = wide * gate * sigmoid * is_free[1]
    gate_up[:, ::2] = dgate * is_free[0]
    made = ((up + 1) * gate * sigmoid).to(grad.dtype)
    dots = (wide * made.float()).sum(-1)
    grad.copy_(made)
    return dots


def _clamped(gate_up: torch.Tensor, clamp: Clamp) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_up[:, ::2].float(), gate_up[:, 1::2].float()
    return gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)


def sum_of_rows(rows: torch.Tensor, places: torch.Tensor, scores: torch.Tensor, out: torch.Tensor) -> None:
    """out (T, N) = of rows (M, N) those at places (T, k), each times its score (T, k), added in this order."""
    total = torch.zeros(out.shape, device=out.device)
    for place, score in zip(places.unbind(1), scores.unbind(1), strict=True):
        total += rows[place].float() * score[:, None].float()
    out.copy_(total)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, scale: float) -> torch.Tensor:
    """Nats of each row: (M,) float32, 0 where ignored. In place: logits (M, V) become scale x the sum's gradient."""
    wide = logits.float()
    nats = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
    kept = labels != ignore_index
    gradient = wide.softmax(-1)
    gradient[torch.arange(len(labels), device=labels.device), labels.where(kept, 0)] -= 1
    logits.copy_(gradient * scale * kept[:, None])
    return nats


def column_dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """<one, other> of each column of two (M, n), over the rows: (n,) float32."""
    return (one.float() * other.float()).sum(0)


def lora_in(x: torch.Tensor, a: torch.Tensor, drop: Drop, out: torch.Tensor) -> None:
    """out (M, R) = what is kept of x (M, K), times A^T; a (R, K)."""
    torch.mm(_dropped(x, drop), a.t(), out=out)


def lora_in_gradient(dz: torch.Tensor, x: torch.Tensor, drop: Drop) -> torch.Tensor:
    """Gradient of A (R, K), of dz (M, R), the gradient of what `lora_in` returned."""
    return torch.mm(dz.t(), _dropped(x, drop))


def add_lora_back(dz: torch.Tensor, a: torch.Tensor, drop: Drop, dx: torch.Tensor) -> None:
    """Add to dx (M, K) what reaches x through its LoRA: dz A where it was kept."""
    dx += _dropped(torch.mm(dz, a), drop)


def _dropped(x: torch.Tensor, drop: Drop) -> torch.Tensor:
    return torch.where(kept(x.shape[0], x.shape[1], drop, x.device), x * drop.scale, 0)
