"""Causal attention for training, over rows of one sample or of several that must not see each other.

Stands on two internals, of torch and of transformers: FLASH and OWN_MASK.
"""

# B rows, T tokens per row, M = B x T, H heads of E values, S samples
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from qlora_ray.libraries import Patch

MAX_FLASH_HEAD = 256  # largest E of PyTorch's FlashAttention
logger = logging.getLogger(__name__)

FLASH = Patch(
    "torch", "2.13.0", "torch.ops.aten._flash_attention_forward is called with the borders of samples",
    gains="all samples of packed rows in one kernel, without a mask",
    delete_when="torch.nn.attention.varlen is no prototype any more",
)  # fmt: skip
OWN_MASK = Patch(
    "transformers", "5.23.0", "masking_utils hands a mask of four dimensions on to the layers as it is",
    gains="borders of samples reach the fused layers, and transformers does not look for packed rows, which waits for "
    "the GPU",
    delete_when="transformers takes the borders of samples",
)  # fmt: skip


def mask_of_borders(borders: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Borders of the samples (S + 1,), in tokens through all rows, as `attend` takes them in the place of a mask.

    (1, 1, L, S + 1) int32 with L the longest sample.
    """
    longest = int(borders.diff().max())
    return borders.to(device, torch.int32, non_blocking=True).expand(1, 1, longest, -1)


def no_mask(device: torch.device) -> torch.Tensor:
    """The same for rows of one sample, (1, 1, 0, 0): else transformers looks for packed rows, and waits for the GPU."""
    return torch.empty(1, 1, 0, 0, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Sight:
    """How a layer's attention weighs scores, and of how many tokens, itself among them, each sees the last."""

    scale: float
    window: int | None = None  # None: of all
    sinks: torch.Tensor | None = None  # (H,), a score beside those of the keys, whose share goes nowhere; frozen
    dropout: float = 0.0  # of scores' weights, from torch's generator; not with sinks

    def is_whole(self, length: int) -> bool:
        """Whether the window shows all of a sample of this length."""
        return self.window is None or length <= self.window


def dense_mask(mask: torch.Tensor, num_rows: int, length: int, sight: Sight) -> torch.Tensor | None:
    """What transformers makes of packed rows, from `mask_of_borders`: (B, 1, T, T), whether a query sees a key."""
    if not mask.numel():
        return None if sight.is_whole(length) else _band(length, sight, mask.device)[None, None]
    place = torch.arange(num_rows * length, device=mask.device)
    sample = torch.searchsorted(mask[0, 0, 0], place, right=True, out_int32=True).view(num_rows, 1, length)
    is_same = sample[:, :, :, None] == sample[:, :, None, :]
    return is_same & _band(length, sight, mask.device)


def added_mask(mask: torch.Tensor | None, like: torch.Tensor, sight: Sight) -> torch.Tensor:
    """`dense_mask` for attention that is written out, which adds one to its scores; it reads `like` (B, T, D)."""
    seen = _band(like.shape[1], sight, like.device)[None, None] if mask is None else mask
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, torch.finfo(like.dtype).min)


def _band(length: int, sight: Sight, device: torch.device) -> torch.Tensor:
    """Whether a query sees a key of its own sample: (T, T)."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if sight.is_whole(length) else seen.triu(1 - (sight.window or 0))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sight: Sight) -> torch.Tensor:
    """q (B, H, T, E), k and v with H or fewer heads -> (B, H, T, E). No mask means causal.

    PyTorch picks the kernel; without a mask that is cuDNN's on Hopper, FlashAttention on other GPUs since Ampere.
    """
    rows, _, length, _ = q.shape
    if mask is None or not mask.numel():
        by_borders = not sight.is_whole(length) or sight.sinks is not None and _has_flash(q)
        mask = _borders_of_rows(rows, length, q.device) if by_borders else None
    if mask is not None and mask.dtype == torch.int32:
        within = _attend_flash if _has_flash(q) else _attend_one_by_one
        output = within(_as_rows(q), _as_rows(k), _as_rows(v), mask, sight)
        return output.unflatten(0, (rows, length)).transpose(1, 2)
    return _attend_dense(q, k, v, mask, sight)


def _attend_dense(q, k, v, mask: torch.Tensor | None, sight: Sight) -> torch.Tensor:
    if sight.sinks is not None:
        return _attend_with_a_sink(q, k, v, mask, sight)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not (mask is None and _kernels_share_keys(q)):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        groups = 1
    return F.scaled_dot_product_attention(
        q, k, v, mask, sight.dropout, mask is None, scale=sight.scale, enable_gqa=groups > 1
    )


def _borders_of_rows(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """`mask_of_borders` of rows of one sample each."""
    borders = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
    return borders.expand(1, 1, length, -1)


def _attend_flash(q, k, v, mask: torch.Tensor, sight: Sight) -> torch.Tensor:
    """All samples in one kernel: q (M, H, E), k and v (M, fewer, E) -> (M, H, E)."""
    if sight.sinks is not None:
        output: torch.Tensor = _FlashWithSinks.apply(q, k, v, mask, sight)
        return output
    dropout = sight.dropout
    return torch.ops.aten._flash_attention_forward(q, k, v, *_borders(mask), dropout, True, False, **_weighing(sight))[
        0
    ]


def _borders(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Of queries and of keys, and the longest sample of both."""
    borders, longest = mask[0, 0, 0], mask.shape[2]
    return borders, borders, longest, longest


def _weighing(sight: Sight) -> dict[str, Any]:
    window = {} if sight.window is None else {"window_size_left": sight.window - 1, "window_size_right": 0}
    return {"scale": sight.scale, **window}


class _FlashWithSinks(torch.autograd.Function):
    """Attention whose weights add up to less than 1: exp(sink) is added to each sum of exponentials.

    With that sum in place of the kernel's own, its backward pass is right as it is: the weights, and the products of
    output and gradient that it takes from them, become those with the sink.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask: torch.Tensor, sight: Sight) -> torch.Tensor:
        output, sums, *rest = torch.ops.aten._flash_attention_forward(
            q, k, v, *_borders(mask), 0.0, True, False, **_weighing(sight)
        )  # sums: (H, M), logarithms
        assert sight.sinks is not None
        with_sinks = torch.logaddexp(sums, sight.sinks.to(sums.dtype)[:, None])
        output = (output * (sums - with_sinks).exp().T[..., None]).to(output.dtype)
        ctx.save_for_backward(q, k, v, output, with_sinks, *rest[:2])
        ctx.mask, ctx.sight = mask, sight
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        *kept, state, unused = ctx.saved_tensors
        gradients = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), *kept, *_borders(ctx.mask), 0.0, True, state, unused, **_weighing(ctx.sight)
        )
        return *gradients, None, None


def _attend_with_a_sink(q, k, v, mask: torch.Tensor | None, sight: Sight) -> torch.Tensor:
    """The same by one key more, of zeros, whose score is the sink."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    seen = _band(length, Sight(sight.scale), q.device) if mask is None else mask
    seen = seen if seen.dtype == torch.bool else seen == 0  # of attention that is written out, which adds its mask
    assert sight.sinks is not None
    shape = (*seen.shape[:-3], len(sight.sinks), length)
    scores = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    sinks = sight.sinks.to(q.dtype)[:, None, None]
    scores = torch.cat([scores.expand(*shape, length), sinks.expand(*shape, 1)], -1)
    k, v = (F.pad(part.repeat_interleave(groups, 1), (0, 0, 0, 1)) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scores, scale=sight.scale)


def _attend_one_by_one(q, k, v, mask: torch.Tensor, sight: Sight) -> torch.Tensor:
    borders = mask[0, 0, 0].tolist()
    outputs = []
    for start, end in zip(borders, borders[1:], strict=False):
        one_q, one_k, one_v = (part[start:end].transpose(0, 1)[None] for part in (q, k, v))  # (1, H, length, E)
        band = None if sight.is_whole(end - start) else _band(end - start, sight, q.device)
        outputs.append(_as_rows(_attend_dense(one_q, one_k, one_v, band, sight)))
    return torch.cat(outputs)


def _as_rows(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).flatten(0, 1)  # (B, H, T, E) -> (M, H, E)


def _has_flash(q: torch.Tensor) -> bool:
    if q.device.type != "cuda":
        return False
    fits = q.dtype != torch.float32 and q.shape[-1] <= MAX_FLASH_HEAD and q.shape[-1] % 8 == 0
    has = fits and _is_ampere(q.device) and torch.backends.cuda.is_flash_attention_available()
    if not has:
        _say_once(f"packed rows: no FlashAttention for {q.dtype} heads of {q.shape[-1]} here; one sample at a time")
    return has


@cache
def _say_once(line: str) -> None:
    logger.info("%s", line)


@cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _kernels_share_keys(q: torch.Tensor) -> bool:
    """Whether a fast kernel takes fewer key heads than query heads; else PyTorch would make the whole T x T matrix."""
    if q.device.type != "cuda":
        return True
    return q.dtype != torch.float32 and _is_ampere(q.device)
