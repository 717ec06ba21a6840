"""DoRA (arXiv:2402.09353) of one projection: each row of W + s B A, divided by its norm, at a length that is learnt.

As in PEFT, the norm is a constant to the gradient.
"""

# n outputs, M tokens
from typing import Any

import torch

from qlora_ray.model.adapter import ADAPTER_NAME


def is_dora(lora: Any) -> bool:
    """Whether one of PEFT's LoRA layers is DoRA, and nothing else."""
    from peft.tuners.lora.variants import DoraLinearVariant

    return bool(lora.lora_variant) and isinstance(lora.lora_variant[ADAPTER_NAME], DoraLinearVariant)


class Magnitude:
    """The learnt lengths of a projection's rows. Holds modules, never their weights."""

    def __init__(self, lora: Any):
        self._lora = lora

    @property
    def parameter(self) -> torch.nn.Parameter:
        """(n,)."""
        return self._lora.lora_magnitude_vector[ADAPTER_NAME].weight

    def gain(self, norm: torch.Tensor) -> torch.Tensor:
        """What each row of [W, s B] is multiplied by, of the norms of W + s B A: both (n,) float32."""
        learnt = self.parameter.data
        return learnt.float() / norm.to(learnt.dtype).float()  # PEFT's norm is in the compute dtype

    def gradient(self, dots: torch.Tensor) -> torch.Tensor:
        """Of the lengths: dots (n,) are <dy, y> over tokens, y without bias, and y is as long as they say."""
        return (dots / self.parameter.data.float()).to(self.parameter.dtype)
