"""Causal attention for training."""

# B rows, T tokens per row, H heads of E values
import torch
import torch.nn.functional as F


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """q (B, H, T, E), k and v with H or fewer heads -> (B, H, T, E). No mask means causal.

    PyTorch picks the kernel; without a mask that is cuDNN's on Hopper, FlashAttention on other GPUs since Ampere.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not (mask is None and _kernels_share_keys(q)):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        groups = 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1)


def _kernels_share_keys(q: torch.Tensor) -> bool:
    """Whether a fast kernel takes fewer key heads than query heads; else PyTorch would make the whole T x T matrix."""
    if q.device.type != "cuda":
        return True
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)
