"""One sweep, from a config to the best adapter: checks, data once, Ray Tune, results; and again after anything."""

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from qlora_ray import storage
from qlora_ray.cluster import connect
from qlora_ray.config import Config, as_written
from qlora_ray.console import chatter_goes_to, console
from qlora_ray.data.check import check_records
from qlora_ray.data.prepare import prepare
from qlora_ray.data.spread import run_on_cores, run_on_ray
from qlora_ray.errors import ConfigError
from qlora_ray.planning.early import as_stored, exact_facts, read_deepspeed_json, refuse_before_ray
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import Plan, make_plan, storage_bytes
from qlora_ray.planning.rows import layout
from qlora_ray.rundir import directory, names
from qlora_ray.sweep import board, capacity, exploit, page, results, screen, space
from qlora_ray.sweep.ledger import FILE, Ledger
from qlora_ray.sweep.space import Trial

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no metric
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def sweep(config: Config, config_name: str, resume: bool, debug: bool, began: float) -> int:
    """Run or go on with a sweep; returns the exit code. Raises ConfigError before anything is started."""
    trials = space.known_trials(config)
    configs = distinct_configs(config, trials)
    check_early(config, configs)
    if "://" in config.ray.storage_path:
        raise ConfigError(
            f"ray.storage_path={config.ray.storage_path}: a sweep follows its trials through files that grow, which "
            "object stores do not have. Use a folder that all nodes share."
        )
    folder = storage.open_folder(config.ray.storage_path)
    storage.check_writable(folder)
    run = Path((folder / directory.name_of_run(config, config_name, folder, resume)).path)
    if resume and not (run / FILE).exists():
        raise ConfigError(f"--resume: {run} has no {FILE}. Leave --resume out to start the sweep.")
    directory.refuse_taken_name(folder / run.name, resume)
    check_records_once(configs)
    connect.set_environment(config, debug)
    os.environ |= TUNE_SETTINGS
    _share_cores(config, configs)
    hardware = connect.start_ray(config, debug)
    plans = prepare_trials(configs, folder, hardware)
    return _run(capacity.plan_sweep(config, plans, hardware), run, trials, debug, began)


def distinct_configs(config: Config, trials: list[Trial]) -> list[Config]:
    """The configs of all trials, or of the corners of the space where the trials are not known yet."""
    points = [trial.parameters for trial in trials] or space.corners(space.sweep_of(config))
    return [space.config_of(config, point) for point in points]


def check_early(config: Config, configs: list[Config]) -> None:
    """Refuse what needs neither data nor hardware to refuse. Raises ConfigError."""
    if space.sweep_of(config).search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError('sweep.search=optuna: Optuna is not installed. pip install "qlora_ray[optuna]", or random.')
    for one in configs:
        capacity.check_metric(one.model_copy(update={"sweep": config.sweep}))
    refuse_before_ray(*configs)


def check_records_once(configs: list[Config]) -> None:
    """Look at the records, once for all trials that read the same. Raises ConfigError."""
    for one in {repr((one.data, one.training.records)): one for one in configs}.values():
        check_records(one)


def prepare_trials(configs: list[Config], folder: Any, hardware: Hardware, inline: bool = False) -> list[Plan]:
    """Tokenize what trials read, once for all that read the same; returns the plan of each config.

    With `inline` it is done in this process, without Ray.
    """
    spread = run_on_ray if connect.address(configs[0]) else run_on_cores
    runner = None if inline else lambda: spread
    plans, prepared, bases = [], {}, {}
    for one in configs:
        base = repr(one.model)
        if base not in bases:
            bases[base] = exact_facts(one)
        one, facts = as_stored(one), bases[base]
        how = layout(one, facts)
        model, training = one.model, one.training
        of_base = model.base_model, model.revision, model.new_tokens
        key = repr((one.data, of_base, training.records, training.seed, training.max_length, how))
        if key not in prepared:
            prepared[key] = prepare(one, folder, how, runner, console.out)
        plans.append(make_plan(one, prepared[key].stats, facts, hardware, read_deepspeed_json(one)))
    return plans


def _share_cores(config: Config, configs: list[Config]) -> None:
    """Threads of a worker, where this machine's cores are all there is and the trials of a sweep share them."""
    if not connect.address(config):
        cores, workers = len(os.sched_getaffinity(0)), max(one.ray.max_workers for one in configs)
        trials = min(space.num_trials(config), max(1, cores // workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // (workers * trials))))


def _run(planned: capacity.Planned, run: Path, trials: list[Trial], debug: bool, began: float) -> int:
    config = planned.config
    most = max(plan.num_trainable_parameters for plan in planned.plans)
    needed = storage_bytes(config, most) * space.num_trials(config)
    storage.check_space(storage.open_folder(str(run)), needed)
    ledger = open_ledger(config, run, trials)
    try:
        screen.show_plan(planned, run)
        session = board.Session(planned, run, ledger, began)
        with contextlib.nullcontext() if debug else chatter_goes_to(f"{run}/sweep.log"):
            status, reason = session.run()
        summary: dict[str, Any] = {}

        def close() -> None:
            ledger.append("close", status=status, reason=reason)
            summary.update(results.write_summary(run, ledger, planned, status, reason))
            page.write(run, config, ledger, summary)

        problem = storage.unless_full(close, "what closes the sweep", storage.open_folder(str(run)))
        if problem:
            print(f"error: the sweep failed: {reason or f'{problem}. {storage.FREE_SPACE}'}", file=sys.stderr)
            return 1
        if not ledger.live():
            shutil.rmtree(run / "pins", ignore_errors=True)
        screen.show_result(summary, run, config)
        return {"done": 0, "interrupted": 130}.get(status, 1)
    finally:
        ledger.close()


def open_ledger(config: Config, run: Path, trials: list[Trial]) -> Ledger:
    """The ledger with all known trials in it, as they stand on disk. Raises ConfigError for another sweep's."""
    ledger = Ledger(run)
    definition = definition_of(config)
    if ledger.definition is None:
        ledger.append("sweep", definition=definition)
    elif ledger.definition != definition:
        changed = _first_difference(ledger.definition, definition)
        ledger.close()
        raise ConfigError(
            f"--resume: {run} was begun with another {changed}. Restore the old setting, or start a new sweep."
        )
    (storage.open_folder(str(run)) / names.CONFIG).write_bytes(
        yaml.safe_dump(as_written(config), sort_keys=False).encode()
    )
    for trial in trials:
        if trial.name not in ledger.trials:
            ledger.append("trial", trial=trial.name, parameters=trial.parameters)
    (run / names.TRIALS).mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):  # rows are shared by all trials, and by other runs
        (run / names.TRIALS / "cache").symlink_to("../../cache")
    for record in ledger.live():  # decided on by a trial, and not told any more
        done = exploit.read(run / names.TRIALS / record.name)
        if done and done["number"] > len(record.exploits):
            ledger.append("exploit", trial=record.name, **exploit.event(done))
    ledger.append("session")
    return ledger


def definition_of(config: Config) -> dict[str, Any]:
    """What must not change between a sweep and its resumption."""
    values = config.model_dump(mode="json", exclude={"logging", "watchdog"})
    for key in ("address", "storage_path", "run_name", "max_failures"):
        del values["ray"][key]
    for key in ("max_concurrent_trials", "time_budget_seconds", "token_budget", "max_failed_trials"):
        del values["sweep"][key]
    return values


def _first_difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if old != new:
            if isinstance(old, dict) and isinstance(new, dict) and key != "parameters":
                return _first_difference(old, new, f"{prefix}{key}.")
            return f"{prefix}{key}: {json.dumps(old)}, now {json.dumps(new)}"
    raise AssertionError("they are the same")
