"""4-bit weights: unpacked, measured, and what of a LoRA lies beside them."""

# n rows and K columns of a weight, M tokens, R columns of LoRAs
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from qlora_ray.model import ops_plain
from qlora_ray.model.ops_plain import Placed

WEIGHTS_PER_SCALE = 64  # bitsandbytes' block size
SCALES_PER_SCALE = 256  # and that of double quantization


def dequantize(weight: torch.Tensor, gain: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write a bitsandbytes 4-bit weight into `out`, (n, K) in the compute dtype, any row stride.

    Its rows are multiplied by gains (n,) where there are such.
    """
    if not _is_known(weight, out.shape[1]):
        return ops_plain.dequantize(weight, gain, out)
    packed = _packed(weight)
    num_blocks = out.numel() // WEIGHTS_PER_SCALE
    per_program = 64
    _dequantize[(triton.cdiv(num_blocks, per_program),)](
        *packed, packed[0] if gain is None else gain, out, num_blocks, out.shape[1], out.stride(0),
        weight.quant_state.nested, gain is not None, per_program, WEIGHTS_PER_SCALE, SCALES_PER_SCALE,  # type: ignore[attr-defined]
    )  # fmt: skip


def _is_known(weight: torch.Tensor, columns: int) -> bool:
    """Whether the kernels below read this way of packing."""
    state = weight.quant_state  # type: ignore[attr-defined]
    nested_is_known = not state.nested or state.state2.blocksize == SCALES_PER_SCALE
    fits = state.blocksize == WEIGHTS_PER_SCALE and columns % WEIGHTS_PER_SCALE == 0
    return fits and nested_is_known and weight.data_ptr() % 16 == 0


def _packed(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Words of 8 values, their scales and code, and scales, code and offset of these."""
    state = weight.quant_state  # type: ignore[attr-defined]
    of_scales = (state.absmax,) * 3
    if state.nested:
        of_scales = (state.state2.code, state.state2.absmax, state.offset)
    return weight.data.view(-1).view(torch.int32), state.absmax, state.code, *of_scales


@triton.jit
def _scales_of(block, there, scales, scale_code, scale_scales, offset, NESTED: tl.constexpr, SCALES: tl.constexpr):
    if NESTED:
        coarse = tl.load(scale_scales + block // SCALES, mask=there, other=0.0)
        fine = tl.load(scale_code + tl.load(scales + block, mask=there, other=0).to(tl.int32))
        # Two roundings, as bitsandbytes does it: a fused multiply-add would differ in the last bit.
        return libdevice.add_rn(libdevice.mul_rn(fine, coarse), tl.load(offset))
    else:
        return tl.load(scales + block, mask=there, other=0.0)


@triton.jit
def _dequantize(
    packed, scales, code, scale_code, scale_scales, offset, gain, out, num_blocks, columns, stride,
    NESTED: tl.constexpr, GAIN: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < num_blocks
    scale = _scales_of(block, there, scales, scale_code, scale_scales, offset, NESTED, SCALES)
    # Words of 8 values each: 16 bytes out of one register, so that neighbouring threads write neighbouring 16 bytes.
    word = tl.arange(0, SIZE // 8)
    words = tl.load(packed + block[:, None] * (SIZE // 8) + word[None, :], mask=there[:, None], other=0)
    nibble = tl.arange(0, 8)
    shift = nibble // 2 * 8 + (1 - nibble % 2) * 4  # the first value of a byte is its high half
    values = tl.load(code + ((words[:, :, None] >> shift[None, None, :]) & 15)) * scale[:, None, None]
    values = tl.reshape(values, (BLOCKS, SIZE))
    start = block.to(tl.int64) * SIZE
    if GAIN:
        of_row = tl.load(gain + start // columns, mask=there, other=0.0)
        values = values.to(out.dtype.element_ty).to(tl.float32) * of_row[:, None]
    place = (start // columns) * stride + start % columns
    target = out + place[:, None] + tl.arange(0, SIZE)[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=there[:, None])


def row_lengths(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Norm of each row of W + scale B A, W a bitsandbytes 4-bit weight in the dtype of A (r, K): (n,) float32.

    W is unpacked in registers alone. Parts of the columns are summed one after the other: the same bits each time.
    """
    (rank, columns), rows = a.shape, b.shape[0]
    if not _is_known(weight, columns):
        return ops_plain.row_lengths(weight, a, b, scale)
    per_program, each = 16, 1024
    squares = torch.empty(triton.cdiv(columns, each), rows, dtype=torch.float32, device=a.device)
    _row_squares[(triton.cdiv(rows, per_program), len(squares))](
        *_packed(weight), a, b, squares, rows, columns, rank, a.stride(0), b.stride(0), scale,
        weight.quant_state.nested, per_program, each, 4, max(16, triton.next_power_of_2(rank)), WEIGHTS_PER_SCALE,  # type: ignore[attr-defined]
        SCALES_PER_SCALE, num_warps=4,
    )  # fmt: skip
    return squares.sum(0).sqrt_()


@triton.jit
def _row_squares(
    packed, scales, code, scale_code, scale_scales, offset, a, b, squares, rows, columns, rank, a_stride, b_stride,
    lora_scale, NESTED: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    row, r = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    part = tl.program_id(1)
    is_low = (row < rows)[:, None] & (r < rank)[None, :]
    low = tl.load(b + row[:, None] * b_stride + r[None, :], mask=is_low, other=0.0)
    nibble = tl.arange(0, 8)
    shift = nibble // 2 * 8 + (1 - nibble % 2) * 4
    word = tl.arange(0, SIZE // 8)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(part * EACH, min((part + 1) * EACH, columns), BLOCKS * SIZE):
        column = start + tl.arange(0, BLOCKS * SIZE)
        number = start // SIZE + tl.arange(0, BLOCKS)  # of a block of weights in its row
        there = (row < rows)[:, None] & (number * SIZE < columns)[None, :]
        block = row[:, None] * (columns // SIZE) + number[None, :]
        scale = _scales_of(block, there, scales, scale_code, scale_scales, offset, NESTED, SCALES)
        scale = tl.where(there, scale, 0.0)
        words = tl.load(packed + block[:, :, None] * (SIZE // 8) + word[None, None, :], mask=there[:, :, None], other=0)
        index = (words[:, :, :, None] >> shift[None, None, None, :]) & 15
        values = tl.reshape(tl.load(code + index) * scale[:, :, None, None], (ROWS, BLOCKS * SIZE))
        is_high = (r < rank)[:, None] & (column < columns)[None, :]
        high = tl.load(a + r[:, None] * a_stride + column[None, :], mask=is_high, other=0.0)
        whole = values.to(high.dtype).to(tl.float32) + lora_scale * tl.dot(low, high, input_precision="ieee")
        total += tl.sum(whole * whole, 1)
    tl.store(squares + part * rows + row, total, mask=row < rows)


def place(placed: Placed | None, out: torch.Tensor) -> None:
    """Write scale x gain x B into its columns of out (n, R), and 0 into the others."""
    rows, columns = out.shape
    wide = triton.next_power_of_2(columns)
    per_program = max(1, min(128, 8192 // wide))
    placed = placed or Placed(out[:, :0], 0.0, 0)
    gain = placed.gain
    _place[(triton.cdiv(rows, per_program),)](
        placed.b, out if gain is None else gain, out, placed.scale, placed.column, placed.b.shape[1], rows, columns,
        out.stride(0), gain is not None, per_program, wide,
    )  # fmt: skip


@triton.jit
def _place(
    b, gain, out, scale, first, rank, rows, columns, stride, GAIN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    its_own = (row < rows) & (column >= first) & (column < first + rank)
    value = tl.load(b + row * rank + column - first, mask=its_own, other=0.0).to(tl.float32) * scale
    if GAIN:
        value = value.to(out.dtype.element_ty).to(tl.float32) * tl.load(gain + row, mask=row < rows, other=0.0)
    target = out + row.to(tl.int64) * stride + column
    tl.store(target, value.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))


def column_dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """<one, other> of each column of two (M, n), over the rows: (n,) float32."""
    rows, columns = one.shape
    one, other = (part if part.stride(1) == 1 else part.contiguous() for part in (one, other))
    per_program, width = 512, 128
    parts = triton.cdiv(rows, per_program)
    sums = torch.empty(parts, columns, dtype=torch.float32, device=one.device)
    _column_dots[(triton.cdiv(columns, width), parts)](
        one, other, sums, rows, columns, one.stride(0), other.stride(0), per_program, 32, width
    )
    return sums.sum(0)


@triton.jit
def _column_dots(
    one, other, sums, rows, columns, one_stride, other_stride,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, ROWS, AT_ONCE):
        row = (part * ROWS + start + tl.arange(0, AT_ONCE)).to(tl.int64)
        there = (row < rows)[:, None] & (column < columns)[None, :]
        a = tl.load(one + row[:, None] * one_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(other + row[:, None] * other_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 0)
    tl.store(sums + part * columns + column, total, mask=column < columns)
