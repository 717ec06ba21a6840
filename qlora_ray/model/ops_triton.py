"""Element-wise steps of a fused decoder layer on a GPU: the functions of `ops_plain`, one kernel each."""

# M tokens (rows x length), D hidden width, I width of the MLP, H heads of E values, V vocabulary
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from qlora_ray.model import ops_plain
from qlora_ray.model.dropout import Drop

WEIGHTS_PER_SCALE = 64  # bitsandbytes' block size
SCALES_PER_SCALE = 256  # and that of double quantization


def dequantize(weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write a bitsandbytes 4-bit weight into `out`, (rows, columns) in the compute dtype, any row stride."""
    state = weight.quant_state  # type: ignore[attr-defined]
    nested = state.nested and state.state2.blocksize == SCALES_PER_SCALE
    fits = state.blocksize == WEIGHTS_PER_SCALE and out.shape[1] % WEIGHTS_PER_SCALE == 0 and state.nested == nested
    if not fits or weight.data_ptr() % 16:
        return ops_plain.dequantize(weight, out)
    num_blocks = out.numel() // WEIGHTS_PER_SCALE
    per_program = 64
    _dequantize[(triton.cdiv(num_blocks, per_program),)](
        weight.data.view(-1).view(torch.int32), state.absmax, state.code, state.state2.code if nested else state.absmax,
        state.state2.absmax if nested else state.absmax, state.offset if nested else state.absmax,
        out, num_blocks, out.shape[1], out.stride(0), nested, per_program, WEIGHTS_PER_SCALE, SCALES_PER_SCALE,
    )  # fmt: skip


@triton.jit
def _dequantize(
    packed, scales, code, scale_code, scale_scales, offset, out, num_blocks, columns, stride,
    NESTED: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < num_blocks
    if NESTED:
        coarse = tl.load(scale_scales + block // SCALES, mask=there)
        fine = tl.load(scale_code + tl.load(scales + block, mask=there).to(tl.int32), mask=there)
        # Two roundings, as bitsandbytes does it: a fused multiply-add would differ in the last bit.
        scale = libdevice.add_rn(libdevice.mul_rn(fine, coarse), tl.load(offset))
    else:
        scale = tl.load(scales + block, mask=there)
    # Words of 8 values each: 16 bytes out of one register, so that neighbouring threads write neighbouring 16 bytes.
    word = tl.arange(0, SIZE // 8)
    words = tl.load(packed + block[:, None] * (SIZE // 8) + word[None, :], mask=there[:, None], other=0)
    nibble = tl.arange(0, 8)
    shift = nibble // 2 * 8 + (1 - nibble % 2) * 4  # the first value of a byte is its high half
    values = tl.load(code + ((words[:, :, None] >> shift[None, None, :]) & 15)) * scale[:, None, None]
    values = tl.reshape(values, (BLOCKS, SIZE))
    start = block.to(tl.int64) * SIZE
    place = (start // columns) * stride + start % columns
    target = out + place[:, None] + tl.arange(0, SIZE)[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=there[:, None])


def place(b: torch.Tensor | None, scale: float, column: int, out: torch.Tensor) -> None:
    """Write scale x b (n, r) into out (n, R) from a column on, and 0 into its other columns."""
    rows, columns = out.shape
    per_program = 128
    rank = 0 if b is None else b.shape[1]
    _place[(triton.cdiv(rows, per_program),)](
        out if b is None else b, out, scale, column, rank, rows, columns, out.stride(0), per_program,
        triton.next_power_of_2(columns),
    )  # fmt: skip


@triton.jit
def _place(b, out, scale, first, rank, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    its_own = (row < rows) & (column >= first) & (column < first + rank)
    value = tl.load(b + row * rank + column - first, mask=its_own, other=0.0).to(tl.float32) * scale
    target = out + row.to(tl.int64) * stride + column
    tl.store(target, value.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))


def rms_norm(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """out (M, D) = weight x normalized(x + added). `added` becomes x + added. Returns 1 / RMS: (M,) float32."""
    rows, width = x.shape
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    _rms_norm[(rows,)](
        x, x if added is None else added, weight, out, inverse, width, out.stride(0), eps, added is not None,
        triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return inverse


@triton.jit
def _rms_norm(x, added, weight, out, inverse, width, stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < width
    value = tl.load(x + row * width + column, mask=there, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(added + row * width + column, mask=there, other=0.0)).to(value.dtype)
        tl.store(added + row * width + column, value, mask=there)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normalized = (wide * scale).to(value.dtype).to(tl.float32)
    gain = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * stride + column, (gain * normalized).to(value.dtype), mask=there)
    tl.store(inverse + row, scale)


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """out: gradient of x (M, D), plus the gradient that reaches x past the norm."""
    rows, width = x.shape
    past = x if residual is None else residual
    _rms_norm_backward[(rows,)](
        grad, x, weight, inverse, past, out, width, grad.stride(0), past.stride(0), out.stride(0),
        residual is not None, triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


@triton.jit
def _rms_norm_backward(
    grad, x, weight, inverse, residual, dx, width, stride, past_stride, out_stride, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < width
    scale = tl.load(inverse + row)
    wide = tl.load(grad + row * stride + column, mask=there, other=0.0).to(tl.float32)
    wide *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    value = tl.load(x + row * width + column, mask=there, other=0.0)
    normalized = value.to(tl.float32) * scale
    result = scale * (wide - normalized * (tl.sum(wide * normalized, 0) / width))
    if RESIDUAL:
        result += tl.load(residual + row * past_stride + column, mask=there, other=0.0).to(tl.float32)
    tl.store(dx + row * out_stride + column, result.to(value.dtype), mask=there)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding in place: heads (M, H, E), cos and sin (M or a divisor of it, E)."""
    rows, count, size = heads.shape
    _rotate[(rows,)](
        heads, cos, sin, cos.shape[0], heads.stride(0), count, size // 2, triton.next_power_of_2(count),
        triton.next_power_of_2(size // 2),
    )  # fmt: skip


@triton.jit
def _rotated(low, high, c, s):
    # transformers rounds after each product.
    kind = low.dtype
    first = (low.to(tl.float32) * c).to(kind).to(tl.float32) - (high.to(tl.float32) * s).to(kind).to(tl.float32)
    second = (high.to(tl.float32) * c).to(kind).to(tl.float32) + (low.to(tl.float32) * s).to(kind).to(tl.float32)
    return first.to(kind), second.to(kind)


@triton.jit
def _rotate(heads, cos, sin, angles, stride, count, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)
    c = tl.load(cos + (row % angles) * 2 * half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + (row % angles) * 2 * half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    there = (head < count) & (column[None, :] < half)
    place = heads + row * stride + head * 2 * half + column[None, :]
    first, second = _rotated(tl.load(place, mask=there), tl.load(place + half, mask=there), c, s)
    tl.store(place, first, mask=there)
    tl.store(place + half, second, mask=there)


def rotate_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> None:
    """Write the gradients of q, k (before rotation) and v, each (B, H, T, E), side by side: (M, all heads x E)."""
    _, count, length, size = dq.shape
    few = dk.shape[1]
    assert dq.stride(3) == dk.stride(3) == dv.stride(3) == 1
    _rotate_backward[(out.shape[0],)](
        dq, dk, dv, cos, sin, out, cos.shape[0], length, count, few, size // 2, out.stride(0), *dq.stride()[:3],
        *dk.stride()[:3], *dv.stride()[:3], triton.next_power_of_2(count), triton.next_power_of_2(few),
        triton.next_power_of_2(size // 2),
    )  # fmt: skip


@triton.jit
def _rotate_backward(
    dq, dk, dv, cos, sin, out, angles, length, count, few, half, stride, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    MANY: tl.constexpr, FEW: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t = row // length, row % length
    column = tl.arange(0, HALF)
    c = tl.load(cos + (row % angles) * 2 * half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    s = -tl.load(sin + (row % angles) * 2 * half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    column = column[None, :]
    head = tl.arange(0, MANY)[:, None]
    there = (head < count) & (column < half)
    source = dq + b * qb + t * qt + head * qh + column
    target = out + row * stride + head * 2 * half + column
    first, second = _rotated(tl.load(source, mask=there), tl.load(source + half, mask=there), c, s)
    tl.store(target, first, mask=there)
    tl.store(target + half, second, mask=there)
    head = tl.arange(0, FEW)[:, None]
    there = (head < few) & (column < half)
    source = dk + b * kb + t * kt + head * kh + column
    target = out + row * stride + (count + head) * 2 * half + column
    first, second = _rotated(tl.load(source, mask=there), tl.load(source + half, mask=there), c, s)
    tl.store(target, first, mask=there)
    tl.store(target + half, second, mask=there)
    source = dv + b * vb + t * vt + head * vh + column
    target = out + row * stride + (count + few + head) * 2 * half + column
    tl.store(target, tl.load(source, mask=there), mask=there)
    tl.store(target + half, tl.load(source + half, mask=there), mask=there)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out (M, I) = silu(gate) x up, of gate_up (M, 2 I)."""
    rows, width = out.shape
    block = 1024
    _swiglu[(rows, triton.cdiv(width, block))](gate_up, out, width, out.stride(0), block)


@triton.jit
def _swiglu(gate_up, out, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=there)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=there)
    wide = gate.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(gate.dtype)
    tl.store(out + row * stride + column, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=there)


def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Back from grad (M, I), in place: gate_up becomes its gradient, and grad what `swiglu` returned."""
    rows, width = grad.shape
    block = 1024
    _swiglu_backward[(rows, triton.cdiv(width, block))](grad, gate_up, width, grad.stride(0), block)


@triton.jit
def _swiglu_backward(grad, gate_up, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate_place = gate_up + row * 2 * width + column
    stored = tl.load(gate_place, mask=there, other=0.0)
    gate, up = stored.to(tl.float32), tl.load(gate_place + width, mask=there, other=0.0).to(tl.float32)
    wide = tl.load(grad + row * stride + column, mask=there, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(stored.dtype).to(tl.float32)
    tl.store(gate_place, (wide * up * sigmoid * (1 + gate * (1 - sigmoid))).to(stored.dtype), mask=there)
    tl.store(gate_place + width, (wide * silu).to(stored.dtype), mask=there)
    tl.store(grad + row * stride + column, (silu * up).to(stored.dtype), mask=there)


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


def lora_in(x: torch.Tensor, a: torch.Tensor, drop: Drop, out: torch.Tensor) -> None:
    """out (M, R) = what is kept of x (M, K), times A^T; a (R, K)."""
    (rows, width), rank = x.shape, a.shape[0]
    _lora_in[(triton.cdiv(rows, 32),)](
        x, a, out, rows, width, rank, x.stride(0), a.stride(0), out.stride(0), drop.key, drop.threshold, drop.scale,
        32, 128, max(16, triton.next_power_of_2(rank)), num_warps=4, num_stages=4,
    )  # fmt: skip


@triton.jit
def _pcg(value):
    state = value * 747796405 + 2891336453
    word = ((state >> ((state >> 28) + 4)) ^ state) * 277803737
    return (word >> 22) ^ word


@triton.jit
def _kept(row, pair, key, threshold):
    # Of row (ROWS,) and pairs of columns (COLUMNS / 2,): (ROWS, COLUMNS), as model/dropout.py has it.
    key = key.to(tl.uint32)
    of_row = _pcg(row.to(tl.uint32) ^ key)
    of_pair = _pcg(pair.to(tl.uint32) ^ ~key)
    words = _pcg(of_row[:, None] ^ of_pair[None, :])
    return tl.interleave(words & 0xFFFF, words >> 16) >= threshold


@triton.jit
def _lora_in(
    x, a, out, rows, width, rank, stride, a_stride, out_stride, key, threshold, scale, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, r = row < rows, tl.arange(0, RANK)
    place = x + row.to(tl.int64)[:, None] * stride
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(place + column[None, :], mask=there[:, None] & (column < width)[None, :], other=0.0)
        keep = _kept(row, start // 2 + tl.arange(0, COLUMNS // 2), key, threshold)
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
    _lora_in_gradient[(triton.cdiv(width, 128), parts)](
        dz, x, sums, rows, width, rank, dz.stride(0), x.stride(0), each, drop.key, drop.threshold, drop.scale, 64, 128,
        max(16, triton.next_power_of_2(rank)), num_warps=4, num_stages=3,
    )  # fmt: skip
    return sums.sum(0).to(x.dtype)


@triton.jit
def _lora_in_gradient(
    dz, x, sums, rows, width, rank, dz_stride, stride, each, key, threshold, scale, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    part, r = tl.program_id(1), tl.arange(0, RANK)
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
        keep = _kept(row, first // 2 + tl.arange(0, COLUMNS // 2), key, threshold)
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
        dz, a, dx, rows, width, rank, dz.stride(0), a.stride(0), dx.stride(0), drop.key, drop.threshold, drop.scale, 64,
        128, max(16, triton.next_power_of_2(rank)), num_warps=4,
    )  # fmt: skip


@triton.jit
def _add_lora_back(
    dz, a, dx, rows, width, rank, dz_stride, a_stride, stride, key, threshold, scale, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column, r = first + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    there = (row < rows)[:, None] & (column < width)[None, :]
    gradient = tl.load(
        dz + row.to(tl.int64)[:, None] * dz_stride + r[None, :], mask=(row < rows)[:, None] & (r < rank)[None, :],
        other=0.0,
    )  # fmt: skip
    weight = tl.load(
        a + r[:, None] * a_stride + column[None, :], mask=(r < rank)[:, None] & (column < width)[None, :], other=0.0
    )
    added = tl.dot(gradient, weight, input_precision="ieee")
    keep = _kept(row, first // 2 + tl.arange(0, COLUMNS // 2), key, threshold)
    place = dx + row.to(tl.int64)[:, None] * stride + column[None, :]
    value = tl.load(place, mask=there, other=0.0)
    total = value.to(tl.float32) + tl.where(keep, added * scale, 0.0)
    tl.store(place, total.to(value.dtype), mask=there)
