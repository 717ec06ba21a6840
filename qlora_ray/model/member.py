"""A projection as it lies in a model: its frozen 4-bit layer, its LoRA, and what a micro-batch has of it of its own."""

# M tokens, K inputs, N outputs of a group of projections, n of one
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora_ray.model.adapter import ADAPTER_NAME
from qlora_ray.model.dora import Magnitude, is_dora
from qlora_ray.model.dropout import NOTHING, Drop
from qlora_ray.model.ops import ops_for


@dataclass(frozen=True)
class Member:
    """One projection: its frozen layer, and its LoRA if it has one."""

    base: Any  # bitsandbytes Linear4bit
    lora: Any  # peft Linear4bit, or None
    magnitude: Magnitude | None = None  # of DoRA
    factor: float = 1.0  # of all that it gives

    @property
    def rank(self) -> int:
        """Of its LoRA; 0 without one."""
        return int(self.lora.r[ADAPTER_NAME]) if self.lora else 0

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return float(self.lora.scaling[ADAPTER_NAME])

    @property
    def a(self) -> torch.nn.Parameter:
        """A, (rank, K)."""
        return self.lora.lora_A[ADAPTER_NAME].weight  # (rank, K)

    @property
    def b(self) -> torch.nn.Parameter:
        """B, (n, rank)."""
        return self.lora.lora_B[ADAPTER_NAME].weight  # (n, rank)

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained of it: A and B, and with DoRA the magnitude; the order of `backward`'s gradients."""
        magnitude = [self.magnitude.parameter] if self.magnitude else []
        return [self.a, self.b, *magnitude] if self.lora else []

    def gain(self) -> torch.Tensor | None:
        """What each row of [W, s B] is multiplied by: (n,) float32; None without DoRA."""
        if self.magnitude is None:
            return None
        weight = self.base.weight
        lengths = ops_for(weight.device).row_lengths(weight, self.a.data, self.b.data, self.scale)
        return self.magnitude.gain(lengths)


@dataclass
class Turn:
    """What one micro-batch has of a group of projections of its own."""

    drop: Drop = NOTHING
    gains: list[torch.Tensor | None] = field(default_factory=list)  # of DoRA: each member's (n,), once forward has them
    given: torch.Tensor | None = None  # (M, N) what they gave, where magnitudes need it for their gradient

    def of_rows(self, rows: slice, device: torch.device) -> "Turn":
        """The same for a slice of the rows."""
        given = None if self.given is None else self.given[rows]
        return replace(self, drop=self.drop.of_rows(rows, device), given=given)


def why_not(module: torch.nn.Module) -> str | None:
    """Why a projection cannot take the fused path; None if it can."""
    from bitsandbytes.nn import Linear4bit as Base
    from peft.tuners.lora import Linear4bit

    lora = module if isinstance(module, Linear4bit) else None
    base = lora.get_base_layer() if lora else module
    if not isinstance(base, Base):
        return "the layer is not 4-bit"
    if lora is None:
        return None
    if list(lora.active_adapters) != [ADAPTER_NAME] or list(lora.lora_A) != [ADAPTER_NAME]:
        return "it has several adapters"
    if lora.lora_variant and not is_dora(lora):
        return f"it is a {type(lora.lora_variant[ADAPTER_NAME]).__name__}"
    if lora.lora_variant and isinstance(lora.lora_dropout[ADAPTER_NAME], torch.nn.Dropout):
        return "it is DoRA with dropout"
    if lora.lora_B[ADAPTER_NAME].bias is not None:
        return "its LoRA has a bias"
    dtypes = {lora.lora_A[ADAPTER_NAME].weight.dtype, lora.lora_B[ADAPTER_NAME].weight.dtype, base.compute_dtype}
    return "its LoRA is not in the compute dtype" if len(dtypes) > 1 else None


def member(module: torch.nn.Module, factor: float = 1.0) -> Member:
    """The layer, taken out of its LoRA if it has one."""
    from peft.tuners.lora import Linear4bit

    if not isinstance(module, Linear4bit):
        return Member(module, None, factor=factor)
    return Member(module.get_base_layer(), module, Magnitude(module) if is_dora(module) else None, factor)
