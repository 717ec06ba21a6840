"""Element-wise steps of a fused decoder layer on a GPU: the functions of `ops_plain`, one kernel each."""

# M tokens (rows x length), D hidden width, I width of the MLP, H heads of E values, V vocabulary
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from qlora_ray.model import ops_plain
from qlora_ray.model.dropout import Drop
from qlora_ray.model.norm import Norm
from qlora_ray.model.ops_plain import Angles, Clamp, Placed

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


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, scale: float) -> torch.Tensor:
    """Nats of each row: (M,) float32, 0 where ignored. In place: logits (M, V) become scale x the sum's gradient."""
    rows, width = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(8192, triton.next_power_of_2(width))
    _cross_entropy[(rows,)](logits, labels, nats, logits.stride(0), ignore_index, scale, width, block, num_warps=16)
    return nats


@triton.jit
def _cross_entropy(logits, labels, nats, stride, ignore_index, scale, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    kept = (label != ignore_index).to(tl.float32)
    label = tl.where(label != ignore_index, label, 0)
    column = tl.arange(0, BLOCK)
    chosen = tl.load(logits + label).to(tl.float32)
    largest = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        value = tl.load(logits + start + column, mask=start + column < width, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(value - larger), 0)
        largest = larger
    tl.store(nats + row, kept * (largest + tl.log(total) - chosen))
    tl.debug_barrier()  # every thread has read the label's logit before it is overwritten
    for start in range(0, width, BLOCK):
        place = start + column
        value = tl.load(logits + place, mask=place < width, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(value - largest) / total - tl.where(place == label, 1.0, 0.0)
        tl.store(logits + place, (kept * scale * gradient).to(logits.dtype.element_ty), mask=place < width)


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
