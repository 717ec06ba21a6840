"""Causal attention for training, over rows of one sample or of several that must not see each other.

Stands on two internals, of torch and of transformers: FLASH and OWN_MASK.
"""

# B rows, T tokens per row, M = B x T, H heads of E values, S samples
import logging
from dataclasses import dataclass
from functools import cache

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
    dropout: float = 0.0  # of scores' weights, from torch's generator

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
        mask = None if sight.is_whole(length) else _borders_of_rows(rows, length, q.device)
    if mask is not None and mask.dtype == torch.int32:
        within = _attend_flash if _has_flash(q) else _attend_one_by_one
        output = within(_as_rows(q), _as_rows(k), _as_rows(v), mask, sight)
        return output.unflatten(0, (rows, length)).transpose(1, 2)
    return _attend_dense(q, k, v, mask, sight)


def _attend_dense(q, k, v, mask: torch.Tensor | None, sight: Sight) -> torch.Tensor:
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
    longest, borders = mask.shape[2], mask[0, 0, 0]
    window = {} if sight.window is None else {"window_size_left": sight.window - 1, "window_size_right": 0}
    return torch.ops.aten._flash_attention_forward(
        q, k, v, borders, borders, longest, longest, sight.dropout, True, False, scale=sight.scale, **window
    )[0]


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
