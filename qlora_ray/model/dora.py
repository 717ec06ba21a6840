"""DoRA (arXiv:2402.09353) of one projection: each row of W + s B A, divided by its norm, at a length that is learnt.

As in PEFT, the norm is a constant to the gradient. It is put together from ||W||^2, which is taken once, since W is
frozen, from <W, B A> = <W A^T, B> and from ||B A||^2, of which no product is larger than a LoRA's own.
"""

# K inputs, n outputs, r rank, M tokens
from typing import Any

import torch

from qlora_ray.model.adapter import ADAPTER_NAME

ROWS_AT_ONCE = 1024  # whose squares are taken in float32 at the same time


def is_dora(lora: Any) -> bool:
    """Whether one of PEFT's LoRA layers is DoRA, and nothing else."""
    from peft.tuners.lora.variants import DoraLinearVariant

    return bool(lora.lora_variant) and isinstance(lora.lora_variant[ADAPTER_NAME], DoraLinearVariant)


class Magnitude:
    """The learnt lengths of a projection's rows. Holds modules, never their weights."""

    def __init__(self, lora: Any):
        self._lora = lora
        self._squares: torch.Tensor | None = None  # of W's rows, (n,) float32

    @property
    def parameter(self) -> torch.nn.Parameter:
        """(n,)."""
        return self._lora.lora_magnitude_vector[ADAPTER_NAME].weight

    def gain(self, weight: torch.Tensor) -> torch.Tensor:
        """What each row of [W, s B] is multiplied by: learnt length / norm, (n,) float32. weight: W (n, K)."""
        a, b = (part[ADAPTER_NAME].weight.data for part in (self._lora.lora_A, self._lora.lora_B))
        scale = float(self._lora.scaling[ADAPTER_NAME])
        if self._squares is None:
            self._squares = torch.cat([rows.float().square().sum(1) for rows in weight.split(ROWS_AT_ONCE)])
        wide_a, wide_b = a.float(), b.float()
        both = (wide_b * torch.mm(weight, a.t()).float()).sum(1)  # <W, B A> by rows
        low = (torch.mm(wide_b, torch.mm(wide_a, wide_a.t())) * wide_b).sum(1)  # ||B A||^2
        norm = (self._squares + 2 * scale * both + scale**2 * low).sqrt()
        return self.parameter.data.float() / norm.to(weight.dtype).float()  # PEFT's norm is in the compute dtype

    def gradient(self, dots: torch.Tensor) -> torch.Tensor:
        """Of the lengths: dots (n,) are <dy, y> over tokens, y without bias, and y is as long as they say."""
        return (dots / self.parameter.data.float()).to(self.parameter.dtype)
