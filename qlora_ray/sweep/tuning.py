"""Ray Tune, told of our trials: its schedulers decide, its searcher suggests, the ledger writes down what it does.

Changes three of its internals: NO_KEYS, TOLD_AGAIN and OWN_NAMES.
"""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from qlora_ray import environment
from qlora_ray.config import Config, SweepConfig
from qlora_ray.libraries import Patch
from qlora_ray.sweep import exploit, space
from qlora_ray.sweep.capacity import Planned, Reports
from qlora_ray.sweep.domain import domain
from qlora_ray.sweep.ledger import Ledger, TrialRecord

MAX_ACTOR_DEATHS = 20  # of a trial, in all; processes of trials are watched by their actor

NO_KEYS = Patch(
    "ray", "2.60.0", "class_cache.ENV_VARS_TO_PROPAGATE has no name of a secret",
    gains="the driver's AWS keys do not stand in a runtime environment that Ray logs",
    delete_when="Ray Tune propagates no keys, or asks which",
)  # fmt: skip
TOLD_AGAIN = Patch(
    "ray", "2.60.0", "ASHAScheduler takes reports without a controller, and of trials that are only a trial_id",
    gains="a sweep whose driver was killed decides as it would have",
    delete_when="Ray Tune restores a scheduler from reports",
)  # fmt: skip
OWN_NAMES = Patch(
    "ray", "2.60.0", "PopulationBasedTraining._get_new_config is overridden",
    gains="a trial that takes over another's parameters keeps its own name, and so its directory",
    delete_when="custom_explore_fn is told the trial",
)  # fmt: skip


class NotPickled:
    """Stays out of the files that Ray Tune writes of itself: nobody reads them again."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict) -> Any:
        return self


class WriteLedger(NotPickled, tune.Callback):
    """Writes down each report, exploit and end."""

    def __init__(self, ledger: Ledger, metric: str, changed: Callable[[str, str], None]):
        self._ledger, self._metric, self._changed = ledger, metric, changed
        self.interrupted: set[str] = set()
        self.running: set[str] = set()
        self.no_space: str | None = None  # what a trial said of a full disk
        self.is_stopping = False

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Ray Tune calls this when a trial starts or goes on."""
        name = trial.config["trial"]
        self.running.add(name)
        self._ledger.trials[name].status = "running"
        self._changed(name, "started")

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Ray Tune calls this at each report: write it and what led to it before anything is decided by it."""
        name = trial.config["trial"]
        record = self._ledger.trials[name]
        exploited = result.get("exploit")
        if exploited and exploited["number"] > len(record.exploits):
            self._ledger.append("exploit", trial=name, **exploit.event(exploited))
            self._changed(name, f"goes on from {exploited['donor']} at step {exploited['step']}")
        if result.get("status") == "interrupted":
            self.interrupted.add(name)
            self.no_space = self.no_space or result.get("no_space")
        if self._metric in result and result.get("is_new", True) and result["step"] > record.reported:
            step, value = result["step"], result[self._metric]
            self._ledger.append("report", trial=name, step=step, **{self._metric: value})
            self._changed(name, f"step {step}: {self._metric} {value:.4f}")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Ray Tune calls this when a trial has ended by itself or the scheduler's word."""
        name, result = trial.config["trial"], trial.last_result or {}
        self.running.discard(name)
        if name in self.interrupted or self._ledger.trials[name].has_ended:
            return
        if "status" in result:
            self._end(name, result["status"], result["reason"])
        else:
            self._end(name, "stopped", f"by the scheduler at step {result.get('step', 0)}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Ray Tune calls this when a trial's actor died too often."""
        name = trial.config["trial"]
        self.running.discard(name)
        if not self.is_stopping:
            self._end(name, "failed", f"its actor died {MAX_ACTOR_DEATHS + 1} times")

    def _end(self, name: str, status: str, reason: str | None) -> None:
        self._ledger.append("end", trial=name, status=status, reason=reason)
        self._changed(name, status if reason is None else f"{status}: {reason}")


class StopAll(NotPickled, tune.Stopper):
    """Ends the experiment once every running trial has left its checkpoint."""

    def __init__(self, may_end: Callable[[], bool]):
        self._may_end = may_end

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Ray Tune asks this after each report: whether the sweep is over."""
        return self._may_end()


class ToldAsha(ASHAScheduler):
    """Ray Tune's ASHA, told again what trials reported before its driver was killed."""

    def __init__(self, records: list[TrialRecord], metric: str, **options: Any):
        super().__init__(metric=metric, **options)
        self._asha_metric = metric
        self._records = {record.name: record for record in records}
        for record in records:
            if record.has_ended:
                stand_in = SimpleNamespace(trial_id=record.name)
                super().on_trial_add(None, stand_in)  # type: ignore[arg-type]
                self._tell(stand_in, record)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune calls this for each trial: tell ASHA the reports that an earlier session has heard."""
        super().on_trial_add(tune_controller, trial)
        if record := self._records.get(trial.config["trial"]):
            self._tell(trial, record)

    def _tell(self, trial: Any, record: TrialRecord) -> None:
        for report in record.reports:
            told = {"step": report["step"], self._asha_metric: report[self._asha_metric]}
            super().on_trial_result(None, trial, told)  # type: ignore[arg-type]


class NamedPbt(PopulationBasedTraining):
    """Ray Tune's PBT; a trial that takes over another's parameters keeps its own name."""

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict, dict]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "trial": trial.config["trial"]}, operations


def scheduler_of(sweep: SweepConfig, reports: Reports, ledger: Ledger) -> FIFOScheduler:
    """Ray Tune's scheduler, as it stood when the ledger ended."""
    mode = space.mode_of(sweep)
    if sweep.scheduler == "asha":
        return ToldAsha(
            list(ledger.trials.values()), sweep.metric, mode=mode, time_attr="step", max_t=reports.num_steps,
            grace_period=reports.grace_period, reduction_factor=sweep.asha.reduction_factor, stop_last_trials=False,
        )  # fmt: skip
    if sweep.scheduler == "pbt":
        random.seed(sweep.seed)  # PBT draws from the module's own generator
        return NamedPbt(
            time_attr="step", metric=sweep.metric, mode=mode, perturbation_interval=reports.perturbation_interval or 0,
            hyperparam_mutations={key: domain(one) for key, one in sweep.parameters.items()},
            quantile_fraction=sweep.pbt.quantile_fraction, resample_probability=sweep.pbt.resample_probability,
            synch=sweep.pbt.synch, require_attrs=False, log_config=False,
        )  # fmt: skip
    return FIFOScheduler()


def search_of(config: Config, ledger: Ledger, max_concurrent: int) -> tuple[Any, dict[str, Any], int]:
    """Ray Tune's search algorithm, its param_space, and how many trials it shall give."""
    sweep = space.sweep_of(config)
    live = ledger.live()
    if sweep.search == "optuna":
        left = space.num_trials(config) - len(ledger.trials) + len(live)
        from qlora_ray.sweep.optuna_search import LedgerSearch

        return LedgerSearch(config, ledger), {}, left
    found: Any = BasicVariantGenerator(max_concurrent=max_concurrent)
    if sweep.scheduler != "pbt":  # the actor has the parameters of each name: Ray Tune cannot hold lists in them
        return found, {"trial": tune.grid_search([one.name for one in live])}, 1
    points = [{"trial": one.name, **one.parameters} for one in live]
    found = BasicVariantGenerator(points_to_evaluate=points, max_concurrent=max_concurrent)
    return found, {key: tune.choice([point[key] for point in points]) for key in points[0]}, len(points)


def keep_keys_back() -> None:
    """Ray Tune would give its actors the driver's AWS keys, in a runtime environment that Ray logs."""
    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not environment.is_secret(name, "")}


def run_config_of(folder: Path, callback: WriteLedger, may_end: Callable[[], bool]) -> tune.RunConfig:
    """Where Ray Tune keeps its own files, whom it tells, and when it ends before its trials do."""
    return tune.RunConfig(
        name="tune", storage_path=str(folder), callbacks=[callback], stop=StopAll(may_end), verbose=0,
        failure_config=tune.FailureConfig(max_failures=MAX_ACTOR_DEATHS),
    )  # fmt: skip


def make_tuner(
    planned: Planned, ledger: Ledger, job: dict[str, Any], run_config: tune.RunConfig, node: str
) -> tune.Tuner:
    """The Tuner of all that is left to do. `node` is the driver's, where data files and models are."""
    from qlora_ray.sweep.trainable import TrialActor

    keep_keys_back()
    search, param_space, num_samples = search_of(planned.config, ledger, planned.room)
    sweep = space.sweep_of(planned.config)
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(TrialActor, job=job), {"CPU": 0, node: 0.001}),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            search_alg=search, scheduler=scheduler_of(sweep, planned.reports, ledger), num_samples=num_samples,
            max_concurrent_trials=planned.room if sweep.search == "optuna" else None, reuse_actors=False,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: f"{trial.config['trial']}_{trial.trial_id}",
        ),
        run_config=run_config,
    )  # fmt: skip
