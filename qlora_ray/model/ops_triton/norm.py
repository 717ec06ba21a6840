"""Norms of rows and of groups within them, there and back."""

# M tokens, D hidden width, G groups of W values
import torch
import triton
import triton.language as tl

from qlora_ray.model.norm import Norm


def norm_rows(x: torch.Tensor, added: torch.Tensor | None, norm: Norm, out: torch.Tensor) -> None:
    """out (M, D) = the norm of x + added. `added` becomes x + added."""
    rows, width = x.shape
    _norm_rows[(rows,)](
        x, x if added is None else added, norm.weight, norm.weight if norm.bias is None else norm.bias, out, width,
        x.stride(0), out.stride(0), norm.eps, added is not None, norm.centers, norm.bias is not None, norm.plus_one,
        norm.rounds_first, triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


@triton.jit
def _gained(wide, kind, weight, column, there, PLUS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr):
    gain = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    if PLUS_ONE:
        gain += 1.0
    if ROUNDS_FIRST:
        wide = wide.to(kind).to(tl.float32)
    return gain * wide


@triton.jit
def _norm_rows(
    x, added, weight, bias, out, width, x_stride, stride, eps, ADD: tl.constexpr, CENTERS: tl.constexpr,
    BIAS: tl.constexpr, PLUS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < width
    value = tl.load(x + row * x_stride + column, mask=there, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(added + row * width + column, mask=there, other=0.0)).to(value.dtype)
        tl.store(added + row * width + column, value, mask=there)
    wide = value.to(tl.float32)
    if CENTERS:
        wide = tl.where(there, wide - tl.sum(wide, 0) / width, 0.0)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    made = _gained(wide, value.dtype, weight, column, there, PLUS_ONE, ROUNDS_FIRST)
    if BIAS:
        made += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * stride + column, made.to(value.dtype), mask=there)


def norm_rows_backward(
    grad: torch.Tensor, x: torch.Tensor, norm: Norm, residual: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out: gradient of x (M, D), plus the gradient that reaches x past the norm."""
    rows, width = x.shape
    past = x if residual is None else residual
    _norm_rows_backward[(rows,)](
        grad, x, norm.weight, past, out, width, x.stride(0), grad.stride(0), past.stride(0), out.stride(0), norm.eps,
        residual is not None, norm.centers, norm.plus_one, triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


@triton.jit
def _norm_rows_backward(
    grad, x, weight, residual, dx, width, x_stride, stride, past_stride, out_stride, eps, RESIDUAL: tl.constexpr,
    CENTERS: tl.constexpr, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < width
    value = tl.load(x + row * x_stride + column, mask=there, other=0.0)
    normalized = value.to(tl.float32)
    if CENTERS:
        normalized = tl.where(there, normalized - tl.sum(normalized, 0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(normalized * normalized, 0) / width + eps)
    normalized *= scale
    gain = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    if PLUS_ONE:
        gain += 1.0
    wide = tl.load(grad + row * stride + column, mask=there, other=0.0).to(tl.float32) * gain
    wide = tl.where(there, wide, 0.0)
    past_mean = normalized * (tl.sum(wide * normalized, 0) / width)
    if CENTERS:
        past_mean += tl.sum(wide, 0) / width
    result = scale * (wide - past_mean)
    if RESIDUAL:
        result += tl.load(residual + row * past_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(dx + row * out_stride + column, result.to(value.dtype), mask=there)


def norm_groups(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    """out = the RMS norm of each of the groups of x, both (M, G, W)."""
    rows, groups, width = x.shape
    assert not norm.centers and norm.bias is None
    _norm_groups[(rows,)](
        x, norm.weight, out, groups, width, x.stride(0), out.stride(0), norm.eps, norm.plus_one, norm.rounds_first,
        triton.next_power_of_2(groups), triton.next_power_of_2(width),
    )  # fmt: skip


@triton.jit
def _norm_groups(
    x, weight, out, groups, width, x_stride, stride, eps, PLUS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group, column = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]
    there = (group < groups) & (column < width)
    place = group * width + column
    value = tl.load(x + row * x_stride + place, mask=there, other=0.0)
    wide = value.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)[:, None]
    gained = _gained(wide, value.dtype, weight, column, column < width, PLUS_ONE, ROUNDS_FIRST)
    tl.store(out + row * stride + place, gained.to(value.dtype), mask=there)


def norm_groups_backward(grad: torch.Tensor, x: torch.Tensor, norm: Norm) -> None:
    """Back from grad (M, G, W), in place."""
    rows, groups, width = x.shape
    _norm_groups_backward[(rows,)](
        grad, x, norm.weight, groups, width, grad.stride(0), x.stride(0), norm.eps, norm.plus_one,
        triton.next_power_of_2(groups), triton.next_power_of_2(width),
    )  # fmt: skip


@triton.jit
def _norm_groups_backward(
    grad, x, weight, groups, width, stride, x_stride, eps, PLUS_ONE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group, column = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]
    there = (group < groups) & (column < width)
    place = group * width + column
    normalized = tl.load(x + row * x_stride + place, mask=there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(normalized * normalized, 1) / width + eps)[:, None]
    normalized *= scale
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if PLUS_ONE:
        gain += 1.0
    stored = tl.load(grad + row * stride + place, mask=there, other=0.0)
    wide = stored.to(tl.float32) * gain
    result = scale * (wide - normalized * (tl.sum(wide * normalized, 1) / width)[:, None])
    tl.store(grad + row * stride + place, result.to(stored.dtype), mask=there)
