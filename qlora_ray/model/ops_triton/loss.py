"""Cross entropy and its gradient in one pass over the logits."""

# M tokens, V vocabulary
import torch
import triton
import triton.language as tl


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
