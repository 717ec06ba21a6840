"""Preference objectives against their formulas written out, pair by pair, in float64."""

import math

import pytest
import torch

from qlora_ray.config import TrainingConfig
from qlora_ray.worker.objectives import (
    FIGURES,
    OBJECTIVES,
    Labelled,
    Pairs,
    figures_of_labelled,
    kto,
    sums,
    sums_of_labelled,
)  # fmt: skip

# Of four pairs: log-probability and tokens of chosen and of rejected, and the reference's log-probabilities.
CASES = [
    (-12.0, 7, -15.0, 9, -13.0, -14.0),
    (-3.5, 2, -1.25, 3, -3.0, -2.0),
    (-80.0, 40, -20.0, 10, -79.0, -25.0),
    (-0.01, 1, -9.0, 4, -0.5, -8.0),
]


def pairs() -> Pairs:
    chosen, num_chosen, rejected, num_rejected, *reference = (
        torch.tensor(column) for column in zip(*CASES, strict=True)
    )
    leaves = (one.requires_grad_() for one in (chosen, rejected))
    return Pairs(*leaves, num_chosen.float(), num_rejected.float(), *reference)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def log_odds(p: float) -> float:
    return math.log(p / (1 - p))


BETA, SMOOTHING, GAMMA, ALPHA = 0.3, 0.1, 0.7, 0.9
WRITTEN_OUT = {
    "dpo": lambda c, n, r, m, rc, rr: (
        -(1 - SMOOTHING) * log_sigmoid(BETA * ((c - rc) - (r - rr)))
        - SMOOTHING * log_sigmoid(-BETA * ((c - rc) - (r - rr)))
        - ALPHA * c / n
    ),
    "ipo": lambda c, n, r, m, rc, rr: ((c - rc) / n - (r - rr) / m - 1 / (2 * BETA)) ** 2 - ALPHA * c / n,
    "orpo": lambda c, n, r, m, rc, rr: (
        -c / n - BETA * log_sigmoid(log_odds(math.exp(c / n)) - log_odds(math.exp(r / m)))
    ),
    "simpo": lambda c, n, r, m, rc, rr: (
        -(1 - SMOOTHING) * log_sigmoid(BETA * (c / n - r / m) - GAMMA)
        - SMOOTHING * log_sigmoid(-(BETA * (c / n - r / m) - GAMMA))
        - ALPHA * c / n
    ),
    "cpo": lambda c, n, r, m, rc, rr: (
        -(1 - SMOOTHING) * log_sigmoid(BETA * (c - r)) - SMOOTHING * log_sigmoid(-BETA * (c - r)) - ALPHA * c / n
    ),
}
SETTINGS = {
    "dpo": {"label_smoothing": SMOOTHING, "rpo_alpha": ALPHA},
    "ipo": {"rpo_alpha": ALPHA},
    "orpo": {},
    "simpo": {"label_smoothing": SMOOTHING, "rpo_alpha": ALPHA, "simpo_gamma": GAMMA},
    "cpo": {"label_smoothing": SMOOTHING, "cpo_alpha": ALPHA},
}


def training(objective: str, **more) -> TrainingConfig:
    return TrainingConfig.model_validate({"objective": objective, "beta": BETA, **more})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_of_each_pair_is_its_formulas(objective):
    asked = training(objective, **SETTINGS[objective])
    expected = [WRITTEN_OUT[objective](*case) for case in CASES]
    assert OBJECTIVES[objective](pairs(), asked).losses.tolist() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_is_that_of_the_formula(objective):
    given, asked, step = pairs(), training(objective, **SETTINGS[objective]), 1e-5
    OBJECTIVES[objective](given, asked).losses.sum().backward()
    for number, case in enumerate(CASES):
        for place, leaf in ((0, given.chosen), (2, given.rejected)):
            up, down = (
                WRITTEN_OUT[objective](*[value + change * (i == place) for i, value in enumerate(case)])
                for change in (step, -step)
            )
            assert float(leaf.grad[number]) == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-6)


def test_figures_are_sums_over_the_pairs_by_trls_names():
    loss, figures = sums(pairs(), training("dpo"))
    found = dict(zip(FIGURES, figures.tolist(), strict=True))
    rewards = [(BETA * (c - rc), BETA * (r - rr)) for c, _, r, _, rc, rr in CASES]
    assert found["rewards/chosen"] == pytest.approx(sum(c for c, _ in rewards), rel=1e-5)
    assert found["rewards/rejected"] == pytest.approx(sum(r for _, r in rewards), rel=1e-5)
    assert found["rewards/margins"] == pytest.approx(sum(c - r for c, r in rewards), rel=1e-5)
    assert found["rewards/accuracies"] == sum(c > r for c, r in rewards)
    assert found["logps/chosen"] == pytest.approx(sum(case[0] for case in CASES), rel=1e-6)
    assert found["nll_loss"] == pytest.approx(sum(-case[0] / case[1] for case in CASES), rel=1e-6)
    assert loss.requires_grad and not figures.requires_grad


def test_an_answer_of_probability_one_has_finite_odds_and_gradient():
    certain = Pairs(
        torch.zeros(1, requires_grad=True), torch.full((1,), -1.0, requires_grad=True), torch.ones(1), torch.ones(1)
    )
    OBJECTIVES["orpo"](certain, training("orpo")).losses.sum().backward()
    assert bool(torch.isfinite(certain.chosen.grad).all()) and bool(torch.isfinite(certain.rejected.grad).all())


def labelled(kinds: list[bool], kl: float = 0.8) -> Labelled:
    answers, tokens, _, _, reference, _ = (torch.tensor(column).float() for column in zip(*CASES, strict=True))
    return Labelled(answers, tokens, reference, torch.tensor(kinds), kl)


def test_loss_of_a_labelled_answer_is_ktos_formula():
    kinds = [True, False, False, True]
    losses, rewards = kto(labelled(kinds), training("kto", desirable_weight=0.6, undesirable_weight=1.7))
    ratios = [case[0] - case[4] for case in CASES]
    signs = [1 if kind else -1 for kind in kinds]
    values = [1 - 1 / (1 + math.exp(-BETA * sign * (ratio - 0.8))) for sign, ratio in zip(signs, ratios, strict=True)]
    weighted = [(0.6 if kind else 1.7) * value for kind, value in zip(kinds, values, strict=True)]
    assert losses.tolist() == pytest.approx(weighted, rel=1e-5)
    assert rewards.tolist() == pytest.approx([BETA * ratio for ratio in ratios], rel=1e-5)


def test_figures_of_labelled_answers_are_means_over_each_kind_and_left_out_of_a_kind_that_is_not_there():
    found = {}
    for kinds in ([True, False, False, True], [True] * 4):
        _, figures = sums_of_labelled(labelled(kinds), training("kto"))
        found[sum(kinds)] = figures_of_labelled(figures.tolist(), 4)
    ratios = [BETA * (case[0] - case[4]) for case in CASES]
    chosen, rejected = (ratios[0] + ratios[3]) / 2, (ratios[1] + ratios[2]) / 2
    assert found[2]["rewards/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert found[2]["rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-5)
    assert found[2]["kl"] == pytest.approx(0.8) and "rewards/margins" not in found[4]
