"""Activations of an MLP, gated or not, there and back."""

# M tokens, I width of the MLP
import torch
import triton
import triton.language as tl


def activate(read: torch.Tensor, is_gelu: bool, out: torch.Tensor) -> None:
    """out (M, I) = activation(gate) x up of gate and up side by side, (M, 2 I), or activation(read) of (M, I).

    The activation is SiLU, or GELU's approximation by tanh.
    """
    rows, width = out.shape
    block = 1024
    is_gated = read.shape[1] > width
    _activate[(rows, triton.cdiv(width, block))](
        read, out, width, read.stride(0), out.stride(0), is_gelu, is_gated, block
    )


@triton.jit
def _inner(gate, IS_GELU: tl.constexpr):
    # Both activations are gate x sigmoid(inner): inner, and its slope.
    if IS_GELU:
        cube = 0.044715 * gate * gate
        return 1.5957691216057308 * gate * (1.0 + cube), 1.5957691216057308 * (1.0 + 3.0 * cube)
    else:
        return gate, gate * 0.0 + 1.0


@triton.jit
def _activate(read, out, width, read_stride, stride, IS_GELU: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate = tl.load(read + row * read_stride + column, mask=there)
    wide = gate.to(tl.float32)
    inner, _ = _inner(wide, IS_GELU)
    active = (wide * tl.sigmoid(inner)).to(gate.dtype)
    if GATED:
        up = tl.load(read + row * read_stride + width + column, mask=there)
        active = (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(out + row * stride + column, active, mask=there)


def activate_backward(grad: torch.Tensor, read: torch.Tensor, is_gelu: bool, out: torch.Tensor) -> None:
    """Back from grad (M, I), which becomes what `activate` returned; out: the gradient of read, which it may be."""
    rows, width = grad.shape
    block = 1024
    is_gated = read.shape[1] > width
    _activate_backward[(rows, triton.cdiv(width, block))](
        grad, read, out, width, grad.stride(0), read.stride(0), out.stride(0), is_gelu, is_gated, block
    )


@triton.jit
def _glu_gradients(stored, up, wide, IS_GELU: tl.constexpr):
    # Of gate and up, and what `activate` returned, for a gradient `wide` of it.
    gate = stored.to(tl.float32)
    inner, slope = _inner(gate, IS_GELU)
    sigmoid = tl.sigmoid(inner)
    active = (gate * sigmoid).to(stored.dtype).to(tl.float32)
    return wide * up * sigmoid * (1 + gate * slope * (1 - sigmoid)), wide * active, active * up


@triton.jit
def _activate_backward(
    grad, read, out, width, stride, read_stride, out_stride, IS_GELU: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate_place = read + row * read_stride + column
    stored = tl.load(gate_place, mask=there, other=0.0)
    wide = tl.load(grad + row * stride + column, mask=there, other=0.0).to(tl.float32)
    target = out + row * out_stride + column
    if GATED:
        up = tl.load(gate_place + width, mask=there, other=0.0).to(tl.float32)
        of_gate, of_up, hidden = _glu_gradients(stored, up, wide, IS_GELU)
        tl.store(target + width, of_up.to(stored.dtype), mask=there)
    else:
        of_gate, _, hidden = _glu_gradients(stored, wide * 0.0 + 1.0, wide, IS_GELU)
    tl.store(target, of_gate.to(stored.dtype), mask=there)
    tl.store(grad + row * stride + column, hidden.to(stored.dtype), mask=there)


def activate_backward_with_dots(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """As `activate_backward` of SiLU; returns <grad, what `activate` returned> of each row: (M,) float32."""
    rows, width = grad.shape
    dots = torch.empty(rows, dtype=torch.float32, device=grad.device)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        _activate_backward_with_dots[(rows,)](grad, gate_up, dots, width, grad.stride(0), block)
    return dots


@triton.jit
def _activate_backward_with_dots(grad, gate_up, dots, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < width
        gate_place = gate_up + row * 2 * width + column
        stored = tl.load(gate_place, mask=there, other=0.0)
        up = tl.load(gate_place + width, mask=there, other=0.0).to(tl.float32)
        wide = tl.load(grad + row * stride + column, mask=there, other=0.0).to(tl.float32)
        of_gate, of_up, hidden = _glu_gradients(stored, up, wide, False)
        kept = hidden.to(stored.dtype)
        total += wide * kept.to(tl.float32)
        tl.store(gate_place, of_gate.to(stored.dtype), mask=there)
        tl.store(gate_place + width, of_up.to(stored.dtype), mask=there)
        tl.store(grad + row * stride + column, kept, mask=there)
    tl.store(dots + row, tl.sum(total, 0))
