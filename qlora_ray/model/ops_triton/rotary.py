"""Rotary embedding of heads, there and back."""

# M tokens, B rows of T tokens, H heads of E values
import torch
import triton
import triton.language as tl

from qlora_ray.model.ops_plain import Angles


def rotate(heads: torch.Tensor, angles: Angles) -> None:
    """Rotary embedding in place: heads (M, H, E), of which the first 2 F values are rotated."""
    rows, count, size = heads.shape
    num_pairs = angles.cos.shape[1] // 2
    _rotate[(rows,)](
        heads, angles.cos, angles.sin, angles.cos.shape[0], heads.stride(0), count, size, num_pairs,
        angles.interleaved, triton.next_power_of_2(count), triton.next_power_of_2(num_pairs),
    )  # fmt: skip


@triton.jit
def _rotated(low, high, c, s, KIND: tl.constexpr):
    # transformers rounds after each product, to the type of cos and sin.
    kind = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    first = (low * c).to(KIND).to(tl.float32) - (high * s).to(KIND).to(tl.float32)
    second = (high * c).to(KIND).to(tl.float32) + (low * s).to(KIND).to(tl.float32)
    return first.to(kind), second.to(kind)


@triton.jit
def _rotate(
    heads, cos, sin, num_angles, stride, count, size, pairs, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    c = tl.load(cos + (row % num_angles) * 2 * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + (row % num_angles) * 2 * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    pair = pair[None, :]
    head = tl.arange(0, HEADS)[:, None]
    there = (head < count) & (pair < pairs)
    place = heads + row * stride + head * size + (2 * pair if INTERLEAVED else pair)
    apart = 1 if INTERLEAVED else pairs
    first, second = _rotated(tl.load(place, mask=there), tl.load(place + apart, mask=there), c, s, cos.dtype.element_ty)
    tl.store(place, first, mask=there)
    tl.store(place + apart, second, mask=there)


def rotate_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, angles: Angles | None, out: torch.Tensor
) -> None:
    """Write the gradients of q, k (before rotation) and v, each (B, H, T, E), side by side: (M, all heads x E)."""
    _, count, length, size = dq.shape
    few, num_pairs = dk.shape[1], angles.cos.shape[1] // 2 if angles else 0
    angles = angles or Angles(dq, dq)  # of no pair: nobody reads it
    assert dq.stride(3) == dk.stride(3) == dv.stride(3) == 1
    _rotate_backward[(out.shape[0],)](
        dq, dk, dv, angles.cos, angles.sin, out, angles.cos.shape[0], length, count, few, size, num_pairs,
        out.stride(0), *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], angles.interleaved,
        triton.next_power_of_2(count), triton.next_power_of_2(few), triton.next_power_of_2(max(1, num_pairs)),
        triton.next_power_of_2(size), size > 2 * num_pairs,
    )  # fmt: skip


@triton.jit
def _back_to(
    source, target, count, size, pairs, c, s, KIND: tl.constexpr, INTERLEAVED: tl.constexpr, PARTIAL: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, SIZE: tl.constexpr, head_stride,
):  # fmt: skip
    head, pair = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, PAIRS)[None, :]
    there = (head < count) & (pair < pairs)
    column = 2 * pair if INTERLEAVED else pair
    apart = 1 if INTERLEAVED else pairs
    place = source + head * head_stride + column
    first, second = _rotated(tl.load(place, mask=there), tl.load(place + apart, mask=there), c, s, KIND)
    tl.store(target + head * size + column, first, mask=there)
    tl.store(target + head * size + column + apart, second, mask=there)
    if PARTIAL:
        rest = tl.arange(0, SIZE)[None, :]
        there = (head < count) & (rest >= 2 * pairs) & (rest < size)
        tl.store(target + head * size + rest, tl.load(source + head * head_stride + rest, mask=there), mask=there)


@triton.jit
def _rotate_backward(
    dq, dk, dv, cos, sin, out, num_angles, length, count, few, size, pairs, stride, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    INTERLEAVED: tl.constexpr, MANY: tl.constexpr, FEW: tl.constexpr, PAIRS: tl.constexpr, SIZE: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t = row // length, row % length
    pair = tl.arange(0, PAIRS)
    c = tl.load(cos + (row % num_angles) * 2 * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    s = -tl.load(sin + (row % num_angles) * 2 * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)[None, :]
    kind: tl.constexpr = cos.dtype.element_ty
    out += row * stride
    _back_to(dq + b * qb + t * qt, out, count, size, pairs, c, s, kind, INTERLEAVED, PARTIAL, MANY, PAIRS, SIZE, qh)
    _back_to(
        dk + b * kb + t * kt, out + count * size, few, size, pairs, c, s, kind, INTERLEAVED, PARTIAL, FEW, PAIRS, SIZE,
        kh,
    )  # fmt: skip
    head, column = tl.arange(0, FEW)[:, None].to(tl.int64), tl.arange(0, SIZE)[None, :]  # T x E x heads: past 2^31
    there = (head < few) & (column < size)
    values = tl.load(dv + b * vb + t * vt + head * vh + column, mask=there)
    tl.store(out + (count + few + head) * size + column, values, mask=there)
