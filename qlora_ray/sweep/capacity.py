"""Whether trials fit: their reports to the scheduler, and their workers to the cluster. Pure: no torch, no Ray."""

import math
from dataclasses import dataclass

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.planning.hardware import Hardware, held
from qlora_ray.planning.plan import Plan
from qlora_ray.sweep import space


@dataclass(frozen=True)
class Reports:
    """When trials report, in optimizer steps."""

    num_steps: int  # of the longest trial
    every: int  # steps from report to report
    grace_period: int
    perturbation_interval: int | None  # with pbt


@dataclass(frozen=True)
class Planned:
    """What is known of a sweep before its first trial."""

    config: Config
    plans: list[Plan]  # of the trials, or of the corners of the space
    reports: Reports
    room: int  # trials that run at a time
    why: str  # no more do

    @property
    def most_steps(self) -> int:
        """Optimizer steps of the whole sweep where no trial is stopped early."""
        return self.reports.num_steps * space.num_trials(self.config)


def plan_sweep(config: Config, plans: list[Plan], hardware: Hardware) -> Planned:
    """Whether trials can be judged, and how many run at a time. Raises ConfigError where they cannot."""
    reports = reports_of(config, plans)
    return Planned(config, plans, reports, *concurrent_trials(config, plans, hardware))


def check_metric(config: Config) -> None:
    """Refuse a metric that no trial can report. Raises ConfigError."""
    sweep = space.sweep_of(config)
    if sweep.metric == "loss":
        return
    has_validation = config.data.validation_file is not None or config.data.validation_split > 0
    if not has_validation:
        raise ConfigError(
            f"sweep.metric={sweep.metric}: is never reported, since there is no validation. Set data.validation_split "
            "or data.validation_file, or use sweep.metric=loss."
        )
    if sweep.metric == "exact_match_adapter":
        if config.evaluation.num_prompts == 0:
            raise ConfigError("sweep.metric=exact_match_adapter: is never reported with evaluation.num_prompts=0.")
        if sweep.scheduler != "fifo":
            raise ConfigError(
                f"sweep.metric=exact_match_adapter: is known only at the end, when {sweep.scheduler} has nothing left "
                "to decide. Use eval_loss, or sweep.scheduler=fifo."
            )


def reports_of(config: Config, plans: list[Plan]) -> Reports:
    """When trials report and the scheduler decides. Raises ConfigError where it could not."""
    sweep = space.sweep_of(config)
    most = max(plan.num_steps for plan in plans)
    every = max(
        (config.logging.every_steps if sweep.metric == "loss" else plan.eval_every_steps or plan.num_steps)
        for plan in plans
    )
    how = "logging.every_steps" if sweep.metric == "loss" else "training.eval_every_steps"
    if sweep.metric != "loss" and any(plan.eval_every_steps is None for plan in plans):
        raise ConfigError(
            f"sweep.metric={sweep.metric}: is never reported, since no record is held out for validation."
        )
    if sweep.scheduler != "fifo" and every >= min(plan.num_steps for plan in plans):
        raise ConfigError(
            f"sweep.scheduler={sweep.scheduler}: the first report is at step {every}, where a trial of {most} steps "
            f"ends. Lower {how}."
        )
    grace = sweep.asha.grace_period or every
    if sweep.scheduler == "asha" and grace >= most:
        raise ConfigError(f"sweep.asha.grace_period={grace}: trials end after {most} steps. Use less.")
    interval = None
    if sweep.scheduler == "pbt":
        interval = sweep.pbt.perturbation_interval or every
        _check_interval(config, interval, every, how, plans)
    return Reports(most, every, grace, interval)


def _check_interval(config: Config, interval: int, every: int, how: str, plans: list[Plan]) -> None:
    saves = max(plan.checkpoint_every_steps for plan in plans)
    key = f"sweep.pbt.perturbation_interval={interval}"
    if interval % every:
        raise ConfigError(f"{key}: must be a multiple of {how}={every}: then the trial is judged.")
    if interval % saves:
        raise ConfigError(
            f"{key}: must be a multiple of checkpoint.every_steps={saves}: what others take over is a checkpoint. "
            f"Set checkpoint.every_steps={every}."
        )
    if interval >= min(plan.num_steps for plan in plans):
        raise ConfigError(f"{key}: trials end after {plans[0].num_steps} steps. Use less.")
    if space.num_trials(config) < 2:
        raise ConfigError("sweep.num_trials=1: sweep.scheduler=pbt needs others to learn from. Use 4 or more.")


def concurrent_trials(config: Config, plans: list[Plan], hardware: Hardware) -> tuple[int, str]:
    """How many trials run at a time, and why. The largest must fit alone, which make_plan has checked."""
    of_all = held(hardware)
    room, why = space.num_trials(config), "all trials fit"
    for plan in plans:
        for name, each in plan.resources_per_worker.items():
            needed = plan.num_workers * each
            if needed and math.floor(of_all.get(name, 0) / needed) < room:
                room = math.floor(of_all[name] / needed)
                why = f"{of_all[name]:g} {name} / ({plan.num_workers} workers x {each:g} {name})"
    most = space.sweep_of(config).max_concurrent_trials
    if most is not None and most < room:
        return most, "sweep.max_concurrent_trials"
    return max(1, room), why


def rungs(config: Config, reports: Reports) -> list[tuple[int, int]]:
    """(steps, trials that go this far) of asha, if it stops exactly the share that it may; else one rung."""
    sweep, trials = space.sweep_of(config), space.num_trials(config)
    if sweep.scheduler != "asha":
        return [(reports.num_steps, trials)]
    found, factor, step = [], sweep.asha.reduction_factor, float(reports.grace_period)
    while step < reports.num_steps:
        # A trial is judged at its first report at or after a rung.
        reached = math.ceil(step / reports.every) * reports.every
        if reached >= reports.num_steps:
            break
        found.append((reached, trials))
        trials = max(1, math.ceil(trials / factor))
        step *= factor
    return [*found, (reports.num_steps, trials)]


def fewest_steps(config: Config, reports: Reports) -> int:
    """Optimizer steps of the whole sweep if asha stops all that it may. Few trials at a time: it will stop fewer."""
    total, before = 0, 0
    for step, trials in rungs(config, reports):
        total += (step - before) * trials
        before = step
    return total
