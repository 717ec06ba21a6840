"""The element-wise steps between products, for a device."""

from functools import cache
from types import ModuleType

import torch


@cache
def ops_for(device: torch.device) -> ModuleType:
    """The element-wise steps for a device: Triton kernels where they run, else plain PyTorch."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        from qlora_ray.model import ops_triton

        return ops_triton
    from qlora_ray.model import ops_plain

    return ops_plain
