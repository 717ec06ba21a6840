"""The loss of preferences as a worker takes it: the model's log-probabilities beside the reference's, by objective."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_ray.config import TrainingConfig
from qlora_ray.worker import objectives
from qlora_ray.worker.loss import log_probabilities
from qlora_ray.worker.team import Team

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Preference:
    """What is asked of the pairs, or of the labelled answers, of a split."""

    training: TrainingConfig
    reference: torch.Tensor | None  # log-probability of each answer, by its place in the split, float32 (N,)
    kl: float = 0.0  # of labelled answers: objectives.Labelled

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over a micro-batch's pairs or answers, a scalar, and the sums of their figures."""
        log_probs, num_tokens = log_probabilities(model, batch)
        if self.training.records == "labels":
            assert self.reference is not None
            reference = self.reference[batch["places"]]
            labelled = objectives.Labelled(log_probs, num_tokens, reference, batch["is_desirable"], self.kl)
            return objectives.sums_of_labelled(labelled, self.training)
        chosen, rejected = log_probs.chunk(2)
        references = (None, None) if self.reference is None else self.reference[batch["places"]].chunk(2)
        pairs = objectives.Pairs(chosen, rejected, *num_tokens.chunk(2), *references)
        return objectives.sums(pairs, self.training)

    def measured_kl(self, engine: Any, team: Team, mismatched: Iterable[tuple[Batch, bool]]) -> float:
        """How far the model is from the reference on mismatched answers, of batches that count or do not.

        Every worker must call this, with as many batches.
        """
        assert self.reference is not None
        ratios: list[float] = []
        engine.train(False)
        with torch.no_grad():
            for batch, counts in mismatched:
                found, _ = log_probabilities(engine.module, batch)
                if counts:
                    ratios += (found - self.reference[batch["places"]]).tolist()
        engine.train()
        every = [ratio for of_worker in team.gather(ratios) for ratio in of_worker]
        return max(0.0, math.fsum(every) / len(every))  # fsum rounds once: the order of workers changes nothing
