"""Norms as families write them: RMS (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450)."""

from dataclasses import dataclass

import torch

from qlora_ray.model.families import Family


@dataclass(frozen=True)
class Norm:
    """A norm: its gain (D,) or what 1 is added to for it, and where it rounds to the compute dtype."""

    weight: torch.Tensor
    eps: float
    plus_one: bool = False
    rounds_first: bool = False
    centers: bool = False  # takes the mean off first
    bias: torch.Tensor | None = None  # (D,)


def norm_of(module: torch.nn.Module, family: Family) -> Norm:
    """The norm that a module holds now: where workers share its weight, that is there for a while only."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
    bias = getattr(module, "bias", None)
    return Norm(
        weight, float(eps), family.plus_one, family.rounds_first, family.centers,  # type: ignore[arg-type]
        bias.data if bias is not None else None,
    )  # fmt: skip
