"""What only layers with experts do: gpt-oss's clamped activation, and the weighing of the experts' rows."""

# T tokens, M rows of experts, k experts of a token, I width of an expert, N hidden width
import torch
import triton
import triton.language as tl

from qlora_ray.model.ops_plain import Clamp


def clamped_glu(gate_up: torch.Tensor, clamp: Clamp, out: torch.Tensor) -> None:
    """out (M, I) of gate_up (M, 2 I)."""
    (rows, width), block = out.shape, 1024
    if rows:
        _clamped_glu[(rows, triton.cdiv(width, block))](
            gate_up, out, width, out.stride(0), clamp.alpha, clamp.limit, block
        )


@triton.jit
def _clamped(gate_up, row, column, width, limit):
    there = column < width
    place = gate_up + row * 2 * width + 2 * column
    gate = tl.load(place, mask=there, other=0.0).to(tl.float32)
    up = tl.load(place + 1, mask=there, other=0.0).to(tl.float32)
    return gate, up, tl.minimum(gate, limit), tl.maximum(tl.minimum(up, limit), -limit)


@triton.jit
def _clamped_glu(gate_up, out, width, stride, alpha, limit, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _, _, gate, up = _clamped(gate_up, row, column, width, limit)
    made = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    tl.store(out + row * stride + column, made.to(out.dtype.element_ty), mask=column < width)


def clamped_glu_backward(grad: torch.Tensor, gate_up: torch.Tensor, clamp: Clamp) -> torch.Tensor:
    """Back from grad (M, I), in place, as `activate_backward_with_dots`."""
    rows, width = grad.shape
    dots = torch.empty(rows, dtype=torch.float32, device=grad.device)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        _clamped_glu_backward[(rows,)](
            grad, gate_up, dots, width, grad.stride(0), clamp.alpha, clamp.limit, block
        )  # fmt: skip
    return dots


@triton.jit
def _clamped_glu_backward(grad, gate_up, dots, width, stride, alpha, limit, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kind = grad.dtype.element_ty
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < width
        free_gate, free_up, gate, up = _clamped(gate_up, row, column, width, limit)
        wide = tl.load(grad + row * stride + column, mask=there, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(alpha * gate)
        of_gate = wide * (up + 1.0) * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))
        of_up = wide * gate * sigmoid
        kept = ((up + 1.0) * gate * sigmoid).to(kind)
        total += wide * kept.to(tl.float32)
        place = gate_up + row * 2 * width + 2 * column
        tl.store(place, tl.where(free_gate <= limit, of_gate, 0.0).to(kind), mask=there)
        tl.store(place + 1, tl.where(tl.abs(free_up) <= limit, of_up, 0.0).to(kind), mask=there)
        tl.store(grad + row * stride + column, kept, mask=there)
    tl.store(dots + row, tl.sum(total, 0))


def sum_of_rows(rows: torch.Tensor, places: torch.Tensor, scores: torch.Tensor, out: torch.Tensor) -> None:
    """out (T, N) = of rows (M, N) those at places (T, k), each times its score (T, k), added in this order."""
    (tokens, width), block = out.shape, 1024
    _sum_of_rows[(tokens, triton.cdiv(width, block))](
        rows, places, scores.contiguous(), out, width, rows.stride(0), out.stride(0), places.shape[1], block
    )


@triton.jit
def _sum_of_rows(rows, places, scores, out, width, stride, out_stride, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for each in range(COUNT):
        row = tl.load(places + token * COUNT + each).to(tl.int64)
        score = tl.load(scores + token * COUNT + each).to(tl.float32)
        total += tl.load(rows + row * stride + column, mask=there, other=0.0).to(tl.float32) * score
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=there)
