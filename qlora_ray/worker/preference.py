"""The loss of pairs as a worker takes it: the model's log-probabilities beside the reference's, by objective."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_ray.config import TrainingConfig
from qlora_ray.worker import objectives
from qlora_ray.worker.loss import log_probabilities


@dataclass(frozen=True)
class Preference:
    """What is asked of the pairs of a split."""

    training: TrainingConfig
    reference: torch.Tensor | None  # log-probability of each answer, by its place in the split, float32 (N,)

    def sums(self, model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over a micro-batch's pairs, a scalar, and the sums of objectives.FIGURES."""
        log_probs, num_tokens = log_probabilities(model, batch)
        chosen, rejected = log_probs.chunk(2)
        reference = (None, None) if self.reference is None else self.reference[batch["places"]].chunk(2)
        pairs = objectives.Pairs(chosen, rejected, *num_tokens.chunk(2), *reference)
        return objectives.sums(pairs, self.training)
