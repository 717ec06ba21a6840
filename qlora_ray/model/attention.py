"""Causal attention for training."""

# B rows, T tokens per row, H heads of E values
import torch
import torch.nn.functional as F


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """q (B, H, T, E), k and v with H or fewer heads -> (B, H, T, E). No mask means causal.

    PyTorch picks the kernel; without a mask that is cuDNN's on Hopper, FlashAttention elsewhere.
    """
    groups = q.shape[1] // k.shape[1]
    if mask is not None and groups > 1:  # only the kernels without a mask share keys among query heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=mask is None and groups > 1
    )
