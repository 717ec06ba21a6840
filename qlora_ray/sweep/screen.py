"""What a person is told of a sweep: its plan before, its result after. Writes nothing to disk."""

import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from qlora_ray.config import Config
from qlora_ray.console import console
from qlora_ray.sweep import capacity, space
from qlora_ray.sweep.capacity import Planned, Reports


def show_value(value: Any) -> str:
    """A value in few digits; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_plan(planned: Planned, run: Path) -> None:
    """What will be done, as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, value in plan_rows(planned).items():
        table.add_row(name, value)
    table.add_row("sweep", str(run))
    console.print(table)
    console.print()


def plan_rows(planned: Planned) -> dict[str, str]:
    """The lines that --plan and the start of a sweep share."""
    config, reports = planned.config, planned.reports
    sweep, largest = space.sweep_of(config), max(planned.plans, key=lambda plan: plan.num_workers)
    kind = "GPU" if largest.use_gpu else "CPU"
    steps, all_steps = capacity.fewest_steps(config, reports), planned.most_steps
    told = f"{steps:,} if asha stops all that it may, {all_steps:,} if none" if steps < all_steps else f"{steps:,}"
    resources = " + ".join(f"{each:g} {name}" for name, each in largest.resources_per_worker.items())
    return {
        "trials": f"{space.num_trials(config)} ({sweep.search}), each {reports.num_steps:,} steps at most",
        "decides": f"{sweep.metric} every {reports.every:,} steps, {_scheduler(config, reports)}",
        "at a time": f"{planned.room} ({planned.why})",
        "a trial": f"{largest.num_workers} x 1 {kind} ({resources} each), ZeRO stage {largest.zero_stage}",
        "steps": told,
    }


def _scheduler(config: Config, reports: Reports) -> str:
    sweep = space.sweep_of(config)
    if sweep.scheduler == "asha":
        rungs = ", ".join(f"{trials} to step {step:,}" for step, trials in capacity.rungs(config, reports))
        return f"asha ({rungs})"
    if sweep.scheduler == "pbt":
        return f"pbt (exploits every {reports.perturbation_interval:,} steps)"
    return "fifo (every trial runs to its end)"


def show_result(summary: dict[str, Any], run: Path, config: Config) -> None:
    """How the sweep ended, and where its results are."""
    counts = ", ".join(f"{count} {status}" for status, count in summary["trials"].items())
    console.print(f"\ntrials   {counts}; {summary['steps']:,} steps of {summary['steps_without_stopping']:,}")
    if best := summary["best"]:
        parameters = ", ".join(f"{key}={show_value(value)}" for key, value in best["parameters"].items())
        console.print(
            f"best     {best['trial']}: {summary['metric']} {best['value']:.4f} at step {best['step']:,} ({parameters})"
        )
    if summary["adapter"]:
        console.print(f"adapter  {summary['adapter']}")
    console.print(f"report   {run}/sweep.html")
    if summary["status"] == "failed":
        print(f"error: the sweep failed: {summary['reason']}", file=sys.stderr)
    elif summary["reason"]:
        console.print(f"Ended early: {summary['reason']}. The same command with --resume and ray.run_name={run.name} "
                      "goes on.")  # fmt: skip
