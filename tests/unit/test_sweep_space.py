"""From parameters to trials, and from plans to what fits."""

import math

import pytest

from qlora_ray.config import make_config
from qlora_ray.errors import ConfigError
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import make_plan
from qlora_ray.sweep import capacity, space
from tests.unit.test_plan import DATA, FACTS

LR = "training.learning_rate"


def config(parameters, training=None, ray=None, checkpoint=None, **sweep):
    return make_config(
        {
            "training": {"max_steps": 90, "eval_every_steps": 10, **(training or {})},
            "ray": ray or {},
            "checkpoint": checkpoint or {},
            "sweep": {"parameters": parameters, **sweep},
        }
    )


def test_grid_is_every_combination_in_order():
    trials = space.known_trials(config({LR: {"grid": [1e-3, 1e-4]}, "model.lora_r": {"grid": [4, 8]}}, search="grid"))
    assert [tuple(trial.parameters.values()) for trial in trials] == [(1e-3, 4), (1e-3, 8), (1e-4, 4), (1e-4, 8)]
    assert [trial.name for trial in trials] == ["t0000", "t0001", "t0002", "t0003"]


def test_asha_meets_a_grid_in_seeded_random_order():
    asked = {LR: {"grid": [i / 1000 for i in range(1, 9)]}}
    plain, mixed = (space.known_trials(config(asked, search="grid", scheduler=one)) for one in ("fifo", "asha"))
    assert mixed == space.known_trials(config(asked, search="grid", scheduler="asha"))
    rates = [trial.parameters[LR] for trial in mixed]
    assert sorted(rates) == [trial.parameters[LR] for trial in plain] != rates


def test_random_trials_are_the_same_for_a_seed_and_lie_in_their_ranges():
    asked = {
        LR: {"loguniform": [1e-4, 1e-2]},
        "model.lora_r": {"randint": [2, 4]},
        "training.warmup_ratio": {"uniform": [0, 0.1]},
        "training.lr_schedule": {"choice": ["linear", "cosine"]},
    }
    trials = space.known_trials(config(asked, num_trials=60, seed=3))
    assert trials == space.known_trials(config(asked, num_trials=60, seed=3))
    assert trials != space.known_trials(config(asked, num_trials=60, seed=4))
    rates = [trial.parameters[LR] for trial in trials]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates) and 20 <= sum(rate < 1e-3 for rate in rates) <= 40
    assert {trial.parameters["model.lora_r"] for trial in trials} == {2, 3, 4}
    assert {trial.parameters["training.lr_schedule"] for trial in trials} == {"linear", "cosine"}


def test_values_are_as_the_config_reads_them():
    (trial,) = space.known_trials(config({LR: {"grid": ["2e-4"]}}, search="grid"))
    assert trial.parameters[LR] == 2e-4


def test_trial_config_is_the_base_with_its_parameters_and_no_sweep():
    base = config({LR: {"grid": [1e-3]}}, search="grid")
    made = space.config_of(base, {LR: 5e-3, "model.lora_r": 2})
    assert (made.training.learning_rate, made.model.lora_r, made.sweep) == (5e-3, 2, None)
    assert made.training.max_steps == base.training.max_steps


@pytest.mark.parametrize(
    ("parameters", "sweep", "why"),
    [
        ({LR: {"uniform": [2, 1]}}, {}, "empty range: 2 is not below 1"),
        ({LR: {"choice": []}}, {}, "at least 1 item"),
        ({LR: {"loguniform": [0, 1]}}, {}, "needs a range above 0"),
        ({LR: {"uniform": [0, 1], "choice": [1]}}, {}, "exactly one of"),
        ({LR: {"unifrom": [0, 1]}}, {}, "unknown key"),
        ({}, {}, "at least 1 item"),
        ({LR: {"choice": [1]}}, {"search": "grid"}, "List its values with grid"),
        ({LR: {"grid": [1]}}, {"search": "random"}, "Use choice, or sweep.search=grid"),
        ({LR: {"grid": [1]}}, {"search": "grid", "num_trials": 3}, "as many trials as combinations"),
        ({"model.target_modules": {"choice": [["q_proj"]]}}, {"search": "optuna"}, "lists a list"),
        ({LR: {"choice": [1]}}, {"mode": "max"}, "sweep.mode: unknown key"),
        ({LR: {"choice": [1]}}, {"scheduler": "pbt", "search": "optuna"}, "Use sweep.search=random"),
        ({LR: {"choice": [1]}}, {"scheduler": "hyperband"}, "'fifo', 'asha' or 'pbt'"),
    ],
)
def test_impossible_sections_are_refused_with_one_message(parameters, sweep, why):
    with pytest.raises(ConfigError) as error:
        config(parameters, **sweep)
    assert why in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "sweep", "why"),
    [
        ({"training.lerning_rate": {"choice": [1]}}, {}, "Did you mean training.learning_rate?"),
        ({"model.lora_r.x": {"choice": [1]}}, {}, "lora_r is a value, not a section"),
        ({"model.lora_r": {"choice": [8, 0]}}, {"search": "optuna"}, "model.lora_r=0"),
        ({"model.lora_r": {"uniform": [1, 8]}}, {}, "valid integer"),
        ({"ray.storage_path": {"choice": ["a"]}}, {}, "must be the same in all trials"),
        ({"sweep.seed": {"choice": [1]}}, {}, "must be the same in all trials"),
        ({"model.lora_r": {"choice": [8, 16]}}, {"scheduler": "pbt"}, "which model.lora_r would not fit"),
        ({"training.batch_size": {"choice": [1, 2]}}, {"scheduler": "pbt"}, "which training.batch_size would not fit"),
    ],
)
def test_impossible_parameters_are_refused_with_one_message(parameters, sweep, why):
    with pytest.raises(ConfigError) as error:
        space.known_trials(config(parameters, **sweep))
    assert why in str(error.value) and "\n" not in str(error.value)


def plans(asked, hardware=None):
    trials = space.known_trials(asked)
    points = [trial.parameters for trial in trials]
    hardware = hardware or Hardware(8, 0)
    return [make_plan(space.config_of(asked, point), DATA, FACTS, hardware, None) for point in points]


def test_trials_at_a_time_follow_from_the_scarcest_resource():
    asked = config({LR: {"loguniform": [1e-4, 1e-2]}}, ray={"num_workers": 2})
    assert capacity.concurrent_trials(asked, plans(asked, Hardware(5, 0)), Hardware(5, 0)) == (
        2,
        "5 CPU / (2 workers x 1 CPU)",
    )
    assert (
        capacity.concurrent_trials(asked, plans(asked, Hardware(64, 0)), Hardware(64, 0))[0] == 8
    )  # there are no more
    fewer = asked.model_copy(update={"sweep": asked.sweep.model_copy(update={"max_concurrent_trials": 1})})
    assert capacity.concurrent_trials(fewer, plans(asked), Hardware(8, 0))[0] == 1


def test_two_cpus_and_four_trials_of_two_workers_run_one_after_the_other():
    asked = config({LR: {"loguniform": [1e-4, 1e-2]}}, ray={"num_workers": 2}, num_trials=4)
    assert capacity.concurrent_trials(asked, plans(asked, Hardware(2, 0)), Hardware(2, 0))[0] == 1


def test_trial_that_never_fits_is_refused_with_the_arithmetic():
    asked = config({LR: {"loguniform": [1e-4, 1e-2]}}, ray={"num_workers": 3})
    with pytest.raises(ConfigError, match="3 x 1 CPU = 3, the cluster holds 2"):
        plans(asked, Hardware(2, 0))


def test_asha_can_save_what_its_rungs_say():
    asked = config({LR: {"loguniform": [1e-4, 1e-2]}}, scheduler="asha", num_trials=9, asha={"reduction_factor": 3})
    reports = capacity.reports_of(asked, plans(asked))
    assert (reports.num_steps, reports.every, reports.grace_period) == (90, 10, 10)
    assert capacity.rungs(asked, reports) == [(10, 9), (30, 3), (90, 1)]
    assert capacity.fewest_steps(asked, reports) == 10 * 9 + 20 * 3 + 60 * 1


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"scheduler": "asha", "training": {"eval_every_steps": 90}}, "Lower training.eval_every_steps"),
        ({"scheduler": "asha", "asha": {"grace_period": 90}}, "sweep.asha.grace_period=90: trials end after 90 steps"),
        ({"scheduler": "pbt", "checkpoint": {"every_steps": 20}}, "must be a multiple of checkpoint.every_steps=20"),
        ({"scheduler": "pbt", "pbt": {"perturbation_interval": 15}}, "must be a multiple of training.eval_every_steps"),
        ({"scheduler": "pbt", "num_trials": 1, "checkpoint": {"every_steps": 10}}, "needs others to learn from"),
    ],
)
def test_scheduler_that_could_never_decide_is_refused(parts, why):
    asked = config({LR: {"loguniform": [1e-4, 1e-2]}}, **parts)
    with pytest.raises(ConfigError) as error:
        capacity.reports_of(asked, plans(asked))
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("data", "evaluation", "sweep", "why"),
    [
        ({"validation_split": 0}, {}, {}, "eval_loss: is never reported, since there is no validation"),
        ({}, {"num_prompts": 0}, {"metric": "exact_match_adapter"}, "never reported with evaluation.num_prompts=0"),
        ({}, {}, {"metric": "exact_match_adapter", "scheduler": "asha"}, "is known only at the end"),
    ],
)
def test_metric_that_is_never_reported_is_refused(data, evaluation, sweep, why):
    asked = make_config(
        {"data": data, "evaluation": evaluation, "sweep": {"parameters": {LR: {"choice": [1e-3]}}, **sweep}}
    )
    with pytest.raises(ConfigError, match=why):
        capacity.check_metric(asked)


def test_loguniform_is_uniform_in_the_logarithm():
    trials = space.known_trials(config({LR: {"loguniform": [1e-5, 1e-1]}}, num_trials=400))
    logs = sorted(math.log10(trial.parameters[LR]) for trial in trials)
    assert abs(sum(logs) / len(logs) + 3) < 0.15
