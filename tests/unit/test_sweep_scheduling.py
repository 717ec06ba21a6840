"""Ray Tune's own schedulers and searchers, told what the ledger knows. No Ray is started."""

import statistics
from types import SimpleNamespace

import pytest
from ray.tune.execution import class_cache
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from qlora_ray.config import make_config
from qlora_ray.sweep import space
from qlora_ray.sweep.capacity import Reports
from qlora_ray.sweep.importance import common_step, importance
from qlora_ray.sweep.ledger import Ledger
from qlora_ray.sweep.results import find_best
from qlora_ray.sweep.tuning import keep_keys_back, scheduler_of, search_of

LR = "training.learning_rate"


def asked(**sweep):
    return make_config({"sweep": {"parameters": {LR: {"loguniform": [1e-4, 1e-2]}}, **sweep}})


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path)
    yield ledger
    ledger.close()


def trial(name):
    return SimpleNamespace(trial_id=f"ray-{name}", config={"trial": name})


@pytest.mark.bites("sweep.tuning.TOLD_AGAIN")
def test_asha_of_a_resumed_sweep_decides_as_the_one_that_was_killed_would_have(ledger):
    losses = {"t0000": 1.0, "t0001": 2.0, "t0002": 3.0, "t0003": 4.0}
    plain = ASHAScheduler(metric="eval_loss", mode="min", time_attr="step", max_t=90, grace_period=10,
                          reduction_factor=3, stop_last_trials=False)  # fmt: skip
    for name, loss in losses.items():
        ledger.append("trial", trial=name, parameters={LR: 1e-3})
        plain.on_trial_add(None, trial(name))
        plain.on_trial_result(None, trial(name), {"step": 10, "eval_loss": loss})
        ledger.append("report", trial=name, step=10, eval_loss=loss)
    ledger.append("end", trial="t0003", status="stopped", reason=None)
    told = scheduler_of(asked(scheduler="asha").sweep, Reports(90, 10, 10, None), ledger)
    for name in ("t0000", "t0004", "t0005"):  # one that goes on, and two new ones
        told.on_trial_add(None, trial(name))
    plain.on_trial_add(None, trial("t0004"))
    plain.on_trial_add(None, trial("t0005"))
    for name, step, loss in [("t0004", 10, 2.5), ("t0005", 10, 0.5), ("t0000", 20, 9.0), ("t0000", 30, 0.9)]:
        result = {"step": step, "eval_loss": loss}
        assert told.on_trial_result(None, trial(name), result) == plain.on_trial_result(None, trial(name), result)
    new = SimpleNamespace(trial_id="new", config={"trial": "new"})
    told.on_trial_add(None, new)
    assert told.on_trial_result(None, new, {"step": 10, "eval_loss": 2.5}) == TrialScheduler.STOP


def test_ray_tune_gets_each_trial_that_has_not_ended_once(ledger):
    from ray.tune.search.variant_generator import generate_variants

    for i, modules in enumerate([["q_proj"], "all-linear", ["q_proj", "v_proj"]]):
        ledger.append("trial", trial=f"t{i:04d}", parameters={"model.target_modules": modules})
    ledger.append("end", trial="t0001", status="done", reason=None)
    _, param_space, num_samples = search_of(asked(), ledger, 2)
    given = [config for _, config in generate_variants(param_space)]
    assert given == [{"trial": "t0000"}, {"trial": "t0002"}] and num_samples == 1


def test_pbt_gets_each_trial_with_the_parameters_that_it_has_now(ledger):
    for i in range(3):
        ledger.append("trial", trial=f"t{i:04d}", parameters={LR: 1e-3 * (i + 1)})
    ledger.append("exploit", trial="t0002", donor="t0000", step=10, sha256={}, parameters={LR: 9e-3})
    generator, param_space, num_samples = search_of(asked(scheduler="pbt"), ledger, 2)
    assert generator._points_to_evaluate == [
        {"trial": "t0000", LR: 1e-3}, {"trial": "t0001", LR: 2e-3}, {"trial": "t0002", LR: 9e-3},
    ]  # fmt: skip
    assert set(param_space) == {"trial", LR} and num_samples == 3


def test_optuna_is_asked_for_no_trial_twice_and_remembers_what_ended(ledger):
    pytest.importorskip("optuna")
    from qlora_ray.sweep.optuna_search import LedgerSearch

    parameters = {LR: {"loguniform": [1e-4, 1e-2]}, "model.lora_r": {"choice": ["8", 16]}}
    config = make_config({"sweep": {"parameters": parameters, "search": "optuna", "num_trials": 6}})
    first = LedgerSearch(config, ledger)
    given = [first.suggest(str(i)) for i in range(3)]
    assert [one["trial"] for one in given] == ["t0000", "t0001", "t0002"]
    assert {name: record.parameters for name, record in ledger.trials.items()} == {
        one["trial"]: {key: value for key, value in one.items() if key != "trial"} for one in given
    }
    ledger.append("report", trial="t0001", step=10, eval_loss=0.5)
    ledger.append("end", trial="t0001", status="done", reason=None)
    again = LedgerSearch(config, ledger)  # of a driver that resumes
    after = [again.suggest(str(i)) for i in range(4)]
    assert after[:2] == [given[0], given[2]]
    assert [one["trial"] for one in after[2:]] == ["t0003", "t0004"]
    assert len({one[LR] for one in [*given, *after[2:]]}) == 5
    told = [one for one in again._ot_study.trials if one.values]
    assert [(one.params, one.values) for one in told] == [(ledger.trials["t0001"].parameters, [0.5])]


def test_best_trial_is_the_best_report_of_those_that_did_not_fail(ledger):
    for name, losses in {"t0000": [3.0, 1.0], "t0001": [2.0, 1.5], "t0002": [0.1]}.items():
        ledger.append("trial", trial=name, parameters={LR: 1e-3})
        for i, loss in enumerate(losses):
            ledger.append("report", trial=name, step=10 * (i + 1), eval_loss=loss)
    ledger.append("end", trial="t0002", status="failed", reason="x")
    best = find_best(ledger, asked().sweep)
    assert best is not None and (best.trial, best.step, best.value) == ("t0000", 20, 1.0)


def test_best_trial_by_margins_is_the_one_with_the_largest(ledger):
    metric = "eval_rewards/margins"
    for name, margins in {"t0000": [0.3, 0.2], "t0001": [0.1, 0.9]}.items():
        ledger.append("trial", trial=name, parameters={LR: 1e-3})
        for step, margin in zip((10, 20), margins, strict=True):
            ledger.append("report", trial=name, step=step, **{metric: margin})
    training = {"objective": "dpo", "metric_for_best_model": metric}
    sweep = {"parameters": {LR: {"loguniform": [1e-4, 1e-2]}}, "metric": metric}
    best = find_best(ledger, make_config({"training": training, "sweep": sweep}).sweep)
    assert best is not None and (best.trial, best.step, best.value) == ("t0001", 20, 0.9)


def test_best_of_an_exploiting_trial_has_the_parameters_that_it_had_then(ledger):
    ledger.append("trial", trial="t0000", parameters={LR: 1e-3})
    ledger.append("report", trial="t0000", step=10, eval_loss=3.0)
    ledger.append("exploit", trial="t0000", donor="t0001", step=10, sha256={}, parameters={LR: 2e-3})
    ledger.append("report", trial="t0000", step=20, eval_loss=1.0)
    ledger.append("exploit", trial="t0000", donor="t0001", step=20, sha256={}, parameters={LR: 4e-3})
    best = find_best(ledger, asked().sweep)
    assert best is not None and best.parameters == {LR: 2e-3}


def test_importance_is_spearmans_rank_correlation():
    rates, ranks = [1, 5, 2, 8, 3, 7, 4, 6], [1, 1, 2, 2, 3, 3, 4, 4]
    losses = [0.1, 0.4, 0.2, 0.9, 0.3, 0.5, 0.45, 0.7]
    points = [({LR: rate, "model.lora_r": rank}, loss) for rate, rank, loss in zip(rates, ranks, losses, strict=True)]
    found = {one.key: one for one in importance(points)}
    places = [1, 4, 2, 8, 3, 6, 5, 7]  # of the losses
    squares = sum((rate - place) ** 2 for rate, place in zip(rates, places, strict=True))
    assert found[LR].strength == pytest.approx(1 - 6 * squares / (8 * (64 - 1)))
    assert "larger is worse" in found[LR].how
    shared = [1.5, 1.5, 3.5, 3.5, 5.5, 5.5, 7.5, 7.5]  # equal values share their mean rank
    assert found["model.lora_r"].strength == pytest.approx(statistics.correlation(shared, places))


def test_importance_of_names_is_the_share_of_variance_between_them():
    points = [({"a": name, "b": 1}, loss) for name, loss in zip("xxxxyyyy", [1, 2, 3, 4, 5, 6, 7, 8], strict=True)]
    (found,) = importance(points)
    between, total = 8 * 2.0**2, 42.0  # of ranks 0 to 7: group means 1.5 and 5.5, their mean 3.5
    assert found.key == "a" and found.strength == pytest.approx((between / total) ** 0.5)
    assert importance(points[:7]) == []  # too few to tell


def test_trials_are_compared_where_most_of_them_reported():
    assert common_step([{10: 1.0, 20: 1.0}, {10: 1.0, 20: 1.0, 30: 1.0}, {10: 1.0}]) == 20
    assert common_step([]) is None


def test_mode_of_each_metric():
    assert space.mode_of(asked().sweep) == "min"
    assert space.mode_of(asked(metric="exact_match_adapter").sweep) == "max"


@pytest.mark.bites("sweep.tuning.NO_KEYS")
def test_ray_tune_gives_no_key_of_the_driver_to_its_actors(monkeypatch):
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", class_cache.ENV_VARS_TO_PROPAGATE | {"AWS_SESSION_TOKEN"})
    keep_keys_back()
    assert "RAY_TRAIN_V2_ENABLED" in class_cache.ENV_VARS_TO_PROPAGATE
    assert not {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a key")
    actor = class_cache._ActorClassCache().get(type("Trainable", (), {}))
    assert "a key" not in str(actor._default_options["runtime_env"])
