"""What a run decides by, and what follows from its step."""

import dataclasses

import pytest

from qlora_ray.data.order import Order
from qlora_ray.data.tokenize import Sample
from qlora_ray.worker.metrics import RowCounts
from qlora_ray.worker.state import State
from tests.made_rows import make_entry


@pytest.mark.parametrize("step", range(12))
def test_tokens_until_a_step_are_those_of_the_steps_before_it(tmp_path, step):
    samples = [Sample(list(range(length)), [(1, length)], False) for length in (5, 9, 4, 7, 11, 6, 8)]
    entry = make_entry(tmp_path, samples, [[i] for i in range(len(samples))])
    counts = RowCounts(entry, Order(len(samples), seed=3, micro_batch_size=2, micro_batches_per_step=2))
    expected = [sum(map(of_step, range(step))) for of_step in (counts.tokens, counts.label_tokens)]
    assert list(counts.until(step)) == expected


def test_run_has_ended_with_its_steps_or_its_patience():
    assert State(step=10).has_ended(10, None) and not State(step=9).has_ended(10, None)
    tired = State(step=3, evaluations_without_improvement=2)
    assert tired.has_ended(10, 2) and not tired.has_ended(10, 3) and not tired.has_ended(10, None)


def test_state_of_an_older_checkpoint_is_read_without_what_is_derived_now():
    old = {"step": 4, "num_tokens": 100, "num_label_tokens": 50, "last_loss": 1.5}
    assert State.of(old) == State(step=4, last_loss=1.5)


@pytest.mark.parametrize(
    ("decides", "values", "best_step", "without"),
    [
        ("eval_loss", [(3.0, 0.1), (2.0, 0.3), (2.5, 0.9)], 2, 1),
        ("eval_rewards/margins", [(3.0, 0.1), (2.0, 0.3), (2.5, 0.9)], 3, 0),
        ("eval_rewards/margins", [(3.0, 0.4), (2.0, 0.3), (1.0, 0.4)], 1, 2),
        ("eval_loss", [(2.0, 0.1), (float("nan"), 0.3), (2.5, 0.9)], 1, 2),
    ],
)
def test_best_validation_is_the_one_of_the_figure_that_decides(decides, values, best_step, without):
    state = State()
    for step, (loss, margin) in enumerate(values, start=1):
        found = {"eval_loss": loss, "eval_rewards/margins": margin}
        state = dataclasses.replace(state, step=step).evaluated(found, decides)
    assert (state.best_eval_step, state.evaluations_without_improvement) == (best_step, without)
    assert state.best_eval_loss == min(loss for loss, _ in values if loss == loss)
