"""What preference objectives make of log-probabilities: a loss and rewards, of each pair or answer. Pure functions.

Settings, figures and values are those of TRL (1.16), but for the term of the chosen answer's own loss: here nats a
token pair by pair, so that the mean over pairs does not depend on batches, where TRL divides by the tokens of a batch;
and in ORPO it is of the answer alone, as in the paper, where TRL counts the prompt in.
"""

# P pairs
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qlora_ray.config import TrainingConfig

FIGURES = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "nll_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of P pairs of answers, each a sum over the answer's tokens, float32 (P,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    num_chosen: torch.Tensor  # tokens of each answer
    num_rejected: torch.Tensor
    reference_chosen: torch.Tensor | None = None
    reference_rejected: torch.Tensor | None = None

    @property
    def mean_chosen(self) -> torch.Tensor:
        """Log-probability a token."""
        return self.chosen / self.num_chosen

    @property
    def mean_rejected(self) -> torch.Tensor:
        """Log-probability a token."""
        return self.rejected / self.num_rejected

    @property
    def log_ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each answer: its log-probability less that of the reference."""
        assert self.reference_chosen is not None and self.reference_rejected is not None
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected


@dataclass(frozen=True)
class Judged:
    """What an objective makes of P pairs, (P,) each."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def dpo(pairs: Pairs, training: TrainingConfig) -> Judged:
    """Direct Preference Optimization (arXiv:2305.18290, eq. 7).

    -log sigmoid(beta x margin), margin = log-ratio of chosen - log-ratio of rejected. With label_smoothing e the
    conservative form (https://ericmitchell.ai/cdpo.pdf, eq. 3): (1 - e) of it, and e of that of the swapped pair.
    """
    chosen, rejected = (training.beta * ratio for ratio in pairs.log_ratios)
    losses = _smoothed(chosen - rejected, training.label_smoothing)
    return Judged(losses + training.rpo_alpha * -pairs.mean_chosen, chosen, rejected)


def ipo(pairs: Pairs, training: TrainingConfig) -> Judged:
    """Identity Preference Optimization (arXiv:2310.12036, eq. 17): (margin - 1 / (2 beta))^2.

    The margin is of log-ratios a token, as TRL has it after asking the authors; beta is the paper's tau.
    """
    chosen, rejected = pairs.log_ratios
    margin = chosen / pairs.num_chosen - rejected / pairs.num_rejected
    losses = (margin - 1 / (2 * training.beta)) ** 2
    return Judged(losses + training.rpo_alpha * -pairs.mean_chosen, training.beta * chosen, training.beta * rejected)


def orpo(pairs: Pairs, training: TrainingConfig) -> Judged:
    """Odds Ratio Preference Optimization (arXiv:2403.07691, eq. 6 and 7).

    Nats a token of the chosen answer - beta x log sigmoid(log odds of chosen - log odds of rejected), where an answer's
    odds are p / (1 - p), p the mean probability a token: exp of the log-probability a token. No reference.
    """
    chosen, rejected = pairs.mean_chosen, pairs.mean_rejected
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    losses = -chosen - training.beta * F.logsigmoid(log_odds)
    return Judged(losses, training.beta * chosen, training.beta * rejected)


def simpo(pairs: Pairs, training: TrainingConfig) -> Judged:
    """Simple Preference Optimization (arXiv:2405.14734, eq. 6): -log sigmoid(beta x margin - simpo_gamma).

    The margin is of log-probabilities a token, without a reference.
    """
    chosen, rejected = training.beta * pairs.mean_chosen, training.beta * pairs.mean_rejected
    losses = _smoothed(chosen - rejected - training.simpo_gamma, training.label_smoothing)
    return Judged(losses + training.rpo_alpha * -pairs.mean_chosen, chosen, rejected)


def cpo(pairs: Pairs, training: TrainingConfig) -> Judged:
    """Contrastive Preference Optimization (arXiv:2401.08417, eq. 3 to 5).

    -log sigmoid(beta x margin) + cpo_alpha x nats a token of the chosen answer; the margin is of log-probabilities,
    without a reference.
    """
    chosen, rejected = training.beta * pairs.chosen, training.beta * pairs.rejected
    losses = _smoothed(chosen - rejected, training.label_smoothing)
    return Judged(losses + training.cpo_alpha * -pairs.mean_chosen, chosen, rejected)


@dataclass(frozen=True)
class Labelled:
    """Log-probabilities of P labelled answers, each a sum over the answer's tokens, float32 (P,)."""

    answers: torch.Tensor
    num_tokens: torch.Tensor
    reference: torch.Tensor
    is_desirable: torch.Tensor  # (P,) bool
    kl: float  # how far the model is from the reference: estimated on as many mismatched answers, not below 0


def kto(labelled: Labelled, training: TrainingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Kahneman-Tversky Optimization (arXiv:2402.01306, eq. 7 and 8). Returns losses and rewards, (P,) each.

    desirable_weight x (1 - sigmoid(beta x (log-ratio - kl))) of a desirable answer, undesirable_weight x (1 -
    sigmoid(beta x (kl - log-ratio))) of another; kl is a constant: no gradient goes through it.
    """
    ratios = labelled.answers - labelled.reference
    sign = torch.where(labelled.is_desirable, 1.0, -1.0)
    weight = torch.where(labelled.is_desirable, training.desirable_weight, training.undesirable_weight)
    losses = weight * (1 - torch.sigmoid(training.beta * sign * (ratios - labelled.kl)))
    return losses, training.beta * ratios.detach()


def sums_of_labelled(labelled: Labelled, training: TrainingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over the answers, a scalar to differentiate; and the sums that `figures_of_labelled` reads."""
    losses, rewards = kto(labelled, training)
    log_probs = labelled.answers.detach()
    nats = -log_probs / labelled.num_tokens
    yes, no = labelled.is_desirable.float(), (~labelled.is_desirable).float()
    every = (yes, no, yes * rewards, no * rewards, yes * log_probs, no * log_probs, yes * nats)
    figures = [each.sum() for each in every]
    return losses.sum(), torch.stack([*figures, torch.full_like(figures[0], labelled.kl * len(losses))])


def figures_of_labelled(sums: list[float], number: int) -> dict[str, float]:
    """Means over desirable and over undesirable answers of what `sums_of_labelled` has summed over `number` answers."""
    yes, no, *of_each, kl = sums
    names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "nll_loss")
    made = {
        name: value / count for name, value, count in zip(names, of_each, (yes, no, yes, no, yes), strict=True) if count
    }
    if yes and no:
        made["rewards/margins"] = made["rewards/chosen"] - made["rewards/rejected"]
    return {**made, "kl": kl / number}


OBJECTIVES: dict[str, Callable[[Pairs, TrainingConfig], Judged]] = {
    "dpo": dpo, "ipo": ipo, "orpo": orpo, "simpo": simpo, "cpo": cpo,
}  # fmt: skip


def sums(pairs: Pairs, training: TrainingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over the pairs, a scalar to differentiate; and the sums of FIGURES, (len(FIGURES),)."""
    judged = OBJECTIVES[training.objective](pairs, training)
    chosen, rejected = judged.chosen_rewards.detach(), judged.rejected_rewards.detach()
    figures = (
        chosen, rejected, chosen - rejected, (chosen > rejected).float(), pairs.chosen.detach(),
        pairs.rejected.detach(), -pairs.mean_chosen.detach(),
    )  # fmt: skip
    return judged.losses.sum(), torch.stack([figure.sum() for figure in figures])


def _smoothed(margins: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    losses = -F.logsigmoid(margins)
    if not label_smoothing:
        return losses
    return losses * (1 - label_smoothing) - F.logsigmoid(-margins) * label_smoothing


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, exact near 0 and far from it.

    Maechler 2012, "Accurately Computing log(1 - exp(-|a|))". x is kept one float32 step below 0: an answer of
    probability 1 has infinite odds.
    """
    x = x.clamp(max=-torch.finfo(torch.float32).eps)
    near = x > -0.6931471805599453
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
