"""What transformers' modules of a layer say of themselves, each family under names of its own."""

from typing import Any

import torch

from qlora_ray.model.attention import Sight

GELU_BY_TANH = ("GELUTanh", "NewGELUActivation")
ACTIVATIONS = ("SiLU", "SiLUActivation", *GELU_BY_TANH)


def activation_of(mlp: torch.nn.Module) -> str:
    """Class of the activation of an MLP."""
    return type(next(getattr(mlp, name) for name in ("act_fn", "activation_fn", "act") if hasattr(mlp, name))).__name__


def own_dropout(attention: Any) -> float:
    """The dropout that the base's config asks of an attention in training."""
    return float(attention.attn_dropout.p if hasattr(attention, "attn_dropout") else attention.attention_dropout)


def sight_of(attention: torch.nn.Module) -> Sight:
    """What each token of a layer sees: its window is its own, or that of all layers."""
    config: Any = attention.config
    window: Any = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    types = getattr(config, "layer_types", None)
    if types and types[attention.layer_idx] == "full_attention":
        window = None
    return Sight(float(attention.scaling), window, getattr(attention, "sinks", None))  # type: ignore[arg-type]
