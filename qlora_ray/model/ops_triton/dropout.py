"""Dropout, alone and on a LoRA's input, whose mask is drawn anew wherever it is needed."""

# M tokens, D or K values of each, R rank of a LoRA
import torch
import triton
import triton.language as tl

from qlora_ray.model.dropout import Drop


def drop_values(x: torch.Tensor, drop: Drop, out: torch.Tensor) -> None:
    """out = what is kept of x, both (M, D); it may be x."""
    rows, width = x.shape
    _drop_values[(triton.cdiv(rows, 8), triton.cdiv(width, 256))](
        x, out, rows, width, x.stride(0), out.stride(0), *_mask(drop, x), 8, 256
    )  # fmt: skip


@triton.jit(do_not_specialize=["which"])  # else some layers get kernels of their own
def _drop_values(
    x, out, rows, width, stride, out_stride, word, which, threshold, scale, numbers, GIVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    key = _key(word, which)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=there, other=0.0)
    keep = _kept(_number(numbers, row, rows, GIVEN), first // 2 + tl.arange(0, COLUMNS // 2), key, threshold)
    value = tl.where(keep, value.to(tl.float32) * scale, 0.0).to(value.dtype)
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + column[None, :], value, mask=there)


def lora_in(x: torch.Tensor, a: torch.Tensor, drop: Drop, out: torch.Tensor) -> None:
    """out (M, R) = what is kept of x (M, K), times A^T; a (R, K)."""
    (rows, width), rank = x.shape, a.shape[0]
    at_once = _ranks_at_once(rank)
    _lora_in[(triton.cdiv(rows, 32), triton.cdiv(rank, at_once))](
        x, a, out, rows, width, rank, x.stride(0), a.stride(0), out.stride(0), *_mask(drop, x), 32, 128,
        at_once, num_warps=4, num_stages=4,
    )  # fmt: skip


def _ranks_at_once(rank: int) -> int:
    """How much of a group's ranks together (three of 128 are 384) a program takes: more would not fit on its core."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def _mask(drop: Drop, beside: torch.Tensor) -> tuple[torch.Tensor | int | float | bool, ...]:
    """What a kernel reads of a mask; `beside` is any tensor on its device."""
    numbers = beside if drop.numbers is None else drop.numbers
    word = drop.word_on(beside.device)
    return word, drop.place, drop.threshold, drop.scale, numbers, drop.numbers is not None


@triton.jit
def _number(numbers, row, rows, GIVEN: tl.constexpr):
    if GIVEN:
        row = tl.load(numbers + row, mask=row < rows, other=0)
    return row


@triton.jit
def _pcg(value):
    state = value * 747796405 + 2891336453
    word = ((state >> ((state >> 28) + 4)) ^ state) * 277803737
    return (word >> 22) ^ word


@triton.jit
def _key(word, which):
    # Of a mask, from what its micro-batch and its place have.
    return _pcg(tl.load(word).to(tl.uint32) ^ which.to(tl.uint32))


@triton.jit
def _kept(row, pair, key, threshold):
    # Of row (ROWS,) and pairs of columns (COLUMNS / 2,): (ROWS, COLUMNS), as model/dropout.py has it.
    of_row = _pcg(row.to(tl.uint32) ^ key)
    of_pair = _pcg(pair.to(tl.uint32) ^ ~key)
    words = _pcg(of_row[:, None] ^ of_pair[None, :])
    return tl.interleave(words & 0xFFFF, words >> 16) >= threshold


@triton.jit(do_not_specialize=["which"])  # else some layers get kernels of their own
def _lora_in(
    x, a, out, rows, width, rank, stride, a_stride, out_stride, word, which, threshold, scale, numbers,
    GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    key = _key(word, which)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, r = row < rows, tl.program_id(1) * RANK + tl.arange(0, RANK)
    place = x + row.to(tl.int64)[:, None] * stride
    number = _number(numbers, row, rows, GIVEN)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(place + column[None, :], mask=there[:, None] & (column < width)[None, :], other=0.0)
        keep = _kept(number, start // 2 + tl.arange(0, COLUMNS // 2), key, threshold)
        value = tl.where(keep, value.to(tl.float32) * scale, 0.0).to(value.dtype)
        weight = tl.load(
            a + r[None, :] * a_stride + column[:, None], mask=(r < rank)[None, :] & (column < width)[:, None], other=0.0
        )
        total = tl.dot(value, weight, total, input_precision="ieee")
    target = out + row.to(tl.int64)[:, None] * out_stride + r[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=there[:, None] & (r < rank)[None, :])


def lora_in_gradient(dz: torch.Tensor, x: torch.Tensor, drop: Drop) -> torch.Tensor:
    """Gradient of A (R, K), of dz (M, R), the gradient of what `lora_in` returned.

    Parts of the rows are summed one after the other: the same bits each time.
    """
    (rows, width), rank = x.shape, dz.shape[1]
    parts = min(16, triton.cdiv(rows, 128))
    each = triton.cdiv(triton.cdiv(rows, parts), 64) * 64
    sums = torch.empty(parts, rank, width, dtype=torch.float32, device=x.device)
    at_once = _ranks_at_once(rank)
    _lora_in_gradient[(triton.cdiv(width, 128), parts, triton.cdiv(rank, at_once))](
        dz, x, sums, rows, width, rank, dz.stride(0), x.stride(0), each, *_mask(drop, x), 64, 128,
        at_once, num_warps=4, num_stages=3,
    )  # fmt: skip
    return sums.sum(0).to(x.dtype)


@triton.jit(do_not_specialize=["which"])  # else some layers get kernels of their own
def _lora_in_gradient(
    dz, x, sums, rows, width, rank, dz_stride, stride, each, word, which, threshold, scale, numbers,
    GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    key = _key(word, which)
    part, r = tl.program_id(1), tl.program_id(2) * RANK + tl.arange(0, RANK)
    first = tl.program_id(0) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(part * each, min((part + 1) * each, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < rows
        value = tl.load(
            x + row.to(tl.int64)[:, None] * stride + column[None, :],
            mask=there[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        keep = _kept(_number(numbers, row, rows, GIVEN), first // 2 + tl.arange(0, COLUMNS // 2), key, threshold)
        value = tl.where(keep, value.to(tl.float32) * scale, 0.0).to(value.dtype)
        gradient = tl.load(
            dz + row.to(tl.int64)[None, :] * dz_stride + r[:, None],
            mask=there[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        total = tl.dot(gradient, value, total, input_precision="ieee")
    target = sums + (part * rank + r).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(target, total, mask=(r < rank)[:, None] & (column < width)[None, :])


def add_lora_back(dz: torch.Tensor, a: torch.Tensor, drop: Drop, dx: torch.Tensor) -> None:
    """Add to dx (M, K) what reaches x through its LoRA: dz A where it was kept."""
    (rows, width), rank = dx.shape, a.shape[0]
    _add_lora_back[(triton.cdiv(rows, 64), triton.cdiv(width, 128))](
        dz, a, dx, rows, width, rank, dz.stride(0), a.stride(0), dx.stride(0), *_mask(drop, dx), 64, 128,
        _ranks_at_once(rank), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["which"])  # else some layers get kernels of their own
def _add_lora_back(
    dz, a, dx, rows, width, rank, dz_stride, a_stride, stride, word, which, threshold, scale, numbers,
    GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    key = _key(word, which)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < width)[None, :]
    added = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK):
        r = start + tl.arange(0, RANK)
        gradient = tl.load(
            dz + row.to(tl.int64)[:, None] * dz_stride + r[None, :],
            mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        weight = tl.load(
            a + r[:, None] * a_stride + column[None, :], mask=(r < rank)[:, None] & (column < width)[None, :], other=0.0
        )
        added = tl.dot(gradient, weight, added, input_precision="ieee")
    keep = _kept(_number(numbers, row, rows, GIVEN), first // 2 + tl.arange(0, COLUMNS // 2), key, threshold)
    place = dx + row.to(tl.int64)[:, None] * stride + column[None, :]
    value = tl.load(place, mask=there, other=0.0)
    total = value.to(tl.float32) + tl.where(keep, added * scale, 0.0)
    tl.store(place, total.to(value.dtype), mask=there)
