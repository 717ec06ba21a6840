"""A resumed run does what it is asked for now, and says so; or it is refused by the name of the key."""

import functools
import json

import pytest
import yaml

from qlora_ray.config import Config, flat, make_config
from qlora_ray.data.stats import DataStats
from qlora_ray.driver import resume
from qlora_ray.errors import ConfigError
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import learning_rate_at, make_plan
from qlora_ray.rundir import directory
from qlora_ray.storage import open_folder
from qlora_ray.worker.checkpoint import save
from qlora_ray.worker.state import State
from tests.chaos.killed_saves import state as adapter_state

DATA = DataStats(
    "key", 100, 0, 0, num_rows=90, num_validation_rows=10, num_tokens=900, num_label_tokens=400, longest_row=50
)
STEPS = 10


def asked(**changes) -> Config:
    """A config of ten steps, with some values at dotted keys."""
    values = Config().model_dump(mode="json")
    values["training"] |= {"max_steps": STEPS, "early_stopping_patience": 2}
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return make_config(values)


facts = functools.cache(lambda: exact_facts(Config()))  # no change here is of what the base and its adapter hold


def plan_of(config: Config):
    return make_plan(config, DATA, facts(), Hardware(8, 0), None)


@pytest.fixture
def run_at(tmp_path):
    """Makes the directory of a run that has come to a step."""

    def make(step: int, status: str, without_improvement: int = 0):
        config, folder = asked(), open_folder(str(tmp_path / "run"))
        state = State(step=step, evaluations_without_improvement=without_improvement)
        save(folder, adapter_state(step), {"step": step, "state": vars(state)}, keep=3)
        directory.write_run_files(folder, config, plan_of(config), DATA, directory.Ground({}, {}, {}))
        rates = [learning_rate_at(k, plan_of(config), config) for k in range(step)]
        lines = [{"step": k + 1, "learning_rate": rate} for k, rate in enumerate(rates)]
        (folder / "metrics.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode())
        (folder / "summary.json").write_bytes(json.dumps({"status": status, "steps": step}).encode())
        (folder / "adapter").make()
        return folder

    return make


def looked(run, config: Config):
    return resume.look(run, config, plan_of(config))


def noted(run, config: Config) -> str:
    return "\n".join(resume.notes(looked(run, config), config, plan_of(config)))


DECIDING = [
    ("training__learning_rate", 5e-4), ("training__lr_schedule", "constant"), ("training__warmup_ratio", 0.5),
    ("training__weight_decay", 0.1), ("training__max_grad_norm", 0.5), ("training__loraplus_lr_ratio", 2),
    ("training__neftune_noise_alpha", 5), ("training__eval_every_steps", 1), ("training__num_epochs", 9),
    ("training__max_steps", 4), ("training__early_stopping_patience", 1), ("training__max_skipped_steps", 1),
    ("training__deterministic", True), ("model__lora_dropout", 0.1), ("evaluation__num_samples", 3),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), DECIDING, ids=[key for key, _ in DECIDING])
def test_change_of_what_is_trained_is_refused_by_name_where_no_step_is_left(run_at, key, value):
    run = run_at(STEPS, "done", without_improvement=1)
    with pytest.raises(ConfigError, match="no step is left") as refused:
        looked(run, asked(**{key: value}))
    shown = "True" if value is True else f"{value:g}" if isinstance(value, float) else value
    assert str(refused.value).startswith(f"--resume: {key.replace('__', '.')}={shown} (before: ")


@pytest.mark.parametrize(("key", "value"), [case for case in DECIDING if case[0] != "training__max_steps"])
def test_change_of_what_is_trained_is_told_with_both_values_and_the_step_where_steps_are_left(run_at, key, value):
    name = key.replace("__", ".")
    before = flat(asked().model_dump(mode="json"))[name]
    then, now = ("null" if one is None else f"{one:g}" if isinstance(one, float) else one for one in (before, value))
    told = noted(run_at(6, "interrupted"), asked(**{key: value}))
    assert told.splitlines()[0] == f"Changed from step 7 on: {name} {then} -> {now}."


def test_new_learning_rate_is_told_with_the_one_the_run_had_come_to(run_at):
    run, now = run_at(STEPS, "done"), asked(training__max_steps=20)
    old, new = asked(), plan_of(now)
    ended, first = learning_rate_at(STEPS - 1, plan_of(old), old), learning_rate_at(STEPS, new, now)
    assert first > 10 * ended
    assert f"Learning rate from step 11 on: {first:.3g} (the run so far ended at {ended:.3g})" in noted(run, now)


def test_another_number_of_workers_a_row_is_told_with_what_it_changes(run_at):
    run, two = run_at(6, "interrupted"), {"training": {"sequence_parallel": 2}, "ray": {"num_workers": 2}}
    values = asked().model_dump(mode="json")
    told = noted(run, make_config({**values, **{name: values[name] | two[name] for name in two}}))
    assert told.startswith("Changed from step 7 on: training.sequence_parallel 1 -> 2.")
    assert "from step 7 on the last bits are not those of the number before" in told


def test_key_that_the_runs_version_did_not_know_had_its_default(run_at):
    run = run_at(6, "interrupted")
    written = yaml.safe_load((run / "config.yaml").read_bytes())
    del written["training"]["weight_decay"]
    (run / "config.yaml").write_bytes(yaml.safe_dump(written).encode())
    assert noted(run, asked()) == ""
    assert "training.weight_decay 0 -> 0.1" in noted(run, asked(training__weight_decay=0.1))


def test_run_that_stopped_early_goes_on_with_more_patience_and_refuses_more_steps(run_at):
    run = run_at(6, "done", without_improvement=2)
    assert "training.early_stopping_patience 2 -> 5" in noted(run, asked(training__early_stopping_patience=5))
    with pytest.raises(ConfigError, match="step 6. Raise training.early_stopping_patience"):
        looked(run, asked(training__max_steps=99))


def test_only_a_run_that_was_closed_where_it_stands_and_is_asked_for_nothing_else_is_complete(run_at):
    assert looked(run_at(STEPS, "done"), asked()).is_complete
    assert not looked(run_at(STEPS, "failed"), asked()).is_complete  # killed before its adapter was written
    assert not looked(run_at(6, "interrupted"), asked()).is_complete
    run = run_at(STEPS, "done")
    assert not looked(run, asked(evaluation__num_prompts=3)).is_complete  # answers are still to be had
    (run / "adapter").delete()
    assert not looked(run, asked()).is_complete


@pytest.mark.parametrize(
    ("key", "value"),
    [("logging__every_steps", 1), ("watchdog__step_seconds", 9), ("ray__max_failures", 9), ("checkpoint__keep", 9)],
)
def test_what_decides_nothing_may_change_without_a_word(run_at, key, value):
    assert noted(run_at(6, "interrupted"), asked(**{key: value})) == ""
    assert looked(run_at(STEPS, "done"), asked(**{key: value})).is_complete


def test_every_key_that_a_resumed_run_may_change_freely_is_a_key():
    known = {*flat(Config().model_dump(mode="json")), *Config.model_fields}
    assert {*resume.DECIDES_NO_STEP, *resume.AT_THE_END, *resume.SCHEDULE} <= known


def test_manifest_keeps_every_change_with_its_step(run_at):
    run, now = run_at(6, "interrupted"), asked(training__learning_rate=1e-3)
    changed = [resume.record(looked(run, now))]
    before = {"changes": [{"after_step": 2, "changed": {"training.weight_decay": [0.1, 0.0]}}]}
    directory.write_run_files(run, now, plan_of(now), DATA, directory.Ground({}, {}, before, changed))
    kept = json.loads((run / "manifest.json").read_bytes())["changes"]
    assert kept == [*before["changes"], {"after_step": 6, "changed": {"training.learning_rate": [2e-4, 1e-3]}}]
    assert yaml.safe_load((run / "config.yaml").read_bytes())["training"]["learning_rate"] == 1e-3
