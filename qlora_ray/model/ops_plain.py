"""Element-wise steps of a fused decoder layer in plain PyTorch: the reference, and what CPUs run.

Their gradients are written out; `ops_triton` does the same with one kernel each. Rounding follows transformers.
"""

# M tokens (rows x length), D hidden width, I width of the MLP, H heads of E values, V vocabulary
import torch
import torch.nn.functional as F

from qlora_ray.libraries import Patch
from qlora_ray.model.dropout import Drop, kept

PACKED_FORMAT = Patch(
    "bitsandbytes", "0.50.2", "reads quant_state (absmax, code, offset, state2) and the order of packed values, here "
    "and in ops_triton.py",
    gains="a weight is unpacked by one kernel, to where the product reads it, instead of by two and a copy",
    delete_when="dequantize_4bit writes into a slice of a buffer",
)  # fmt: skip


def dequantize(weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write a bitsandbytes 4-bit weight into `out`, (rows, columns) in the compute dtype, any row stride."""
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(weight.data.reshape(-1, 1), weight.quant_state))  # type: ignore[attr-defined]


def place(b: torch.Tensor | None, scale: float, column: int, out: torch.Tensor) -> None:
    """Write scale x b (n, r) into out (n, R) from a column on, and 0 into its other columns."""
    out.zero_()
    if b is not None:
        torch.mul(b, scale, out=out[:, column : column + b.shape[1]])


def rms_norm(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """out (M, D) = weight x normalized(x + added). `added` becomes x + added. Returns 1 / RMS: (M,) float32."""
    if added is not None:
        x = added.add_(x)
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)  # (M,)
    out.copy_(weight * (wide * inverse[:, None]).to(x.dtype))
    return inverse


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """out: gradient of x (M, D), plus the gradient that reaches x past the norm."""
    wide = grad.float() * weight.float()
    normalized = x.float() * inverse[:, None]
    dx = inverse[:, None] * (wide - normalized * (wide * normalized).mean(-1, keepdim=True))
    out.copy_(dx if residual is None else dx + residual.float())


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding in place: heads (M, H, E), cos and sin (M or a divisor of it, E)."""
    repeats = heads.shape[0] // cos.shape[0]
    cos, sin = cos.repeat(repeats, 1)[:, None], sin.repeat(repeats, 1)[:, None]  # (M, 1, E)
    low, high = heads.chunk(2, -1)
    heads.copy_(heads * cos + torch.cat((-high, low), -1) * sin)


def rotate_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the gradients of q, k (before rotation) and v, each (B, H, T, E), side by side: (M, all heads x E)."""
    rows = [part.transpose(1, 2).reshape(out.shape[0], -1, part.shape[-1]) for part in (dq, dk, dv)]  # (M, H, E)
    rotated = torch.cat(rows[:2], 1)
    rotate(rotated, cos, -sin)
    out.copy_(torch.cat((rotated, rows[2]), 1).flatten(1))


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out (M, I) = silu(gate) x up, of gate_up (M, 2 I)."""
    gate, up = gate_up.chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Back from grad (M, I), in place: gate_up becomes its gradient, and grad what `swiglu` returned."""
    gate, up = (part.float() for part in gate_up.chunk(2, -1))
    sigmoid = gate.sigmoid()
    silu = (gate * sigmoid).to(grad.dtype)
    wide = grad.float()
    dgate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = wide * silu.float()
    grad.copy_(silu * up.to(grad.dtype))
    gate_up.copy_(torch.cat((dgate, dup), -1))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, scale: float) -> torch.Tensor:
    """Nats of each row: (M,) float32, 0 where ignored. In place: logits (M, V) become scale x the sum's gradient."""
    wide = logits.float()
    nats = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
    kept = labels != ignore_index
    gradient = wide.softmax(-1)
    gradient[torch.arange(len(labels), device=labels.device), labels.where(kept, 0)] -= 1
    logits.copy_(gradient * scale * kept[:, None])
    return nats


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
