"""sweep.html: one sweep as one page for people, self-contained like a run's own."""

from pathlib import Path
from typing import Any

import yaml

from qlora_ray.config import Config
from qlora_ray.report.charts import show_duration
from qlora_ray.report.page import Page, render, write_page
from qlora_ray.rundir import names
from qlora_ray.rundir.record import read_run
from qlora_ray.sweep import charts, results, space
from qlora_ray.sweep.importance import MIN_TRIALS, common_step, importance
from qlora_ray.sweep.ledger import Ledger, TrialRecord


def write(run: Path, config: Config, ledger: Ledger, summary: dict[str, Any]) -> Path:
    """Write sweep.html in one rename."""
    return write_page(run / names.SWEEP_REPORT, render_sweep(run, config, ledger, summary))


def render_sweep(run: Path, config: Config, ledger: Ledger, summary: dict[str, Any]) -> str:
    """The page."""
    sweep = space.sweep_of(config)
    records = list(ledger.trials.values())
    folders = {record.name: run / names.TRIALS / record.name for record in records}
    lines = {name: read_run(folder).metrics for name, folder in folders.items() if folder.exists()}
    exploits = {record.name: record.exploits for record in records}
    titles = curves(config)
    figures = {name: charts.curves_chart(lines, name, exploits) for name in titles}
    figures = {name: figure for name, figure in figures.items() if figure is not None}
    step, points = comparable(records, sweep.metric)
    sign = 1 if space.mode_of(sweep) == "min" else -1
    found = importance([(parameters, sign * value) for _, parameters, value in points])
    if len(points) > 1:
        figures["parallel"] = charts.parallel_chart(points, sweep.metric, space.mode_of(sweep))
    if found:
        figures["importance"] = charts.importance_chart(found)
    values = dict(
        title=f"{run.name} · sweep",
        status=summary["status"],
        reason=summary["reason"],
        figures=key_figures(summary, sweep.metric),
        curves={name: title for name, title in titles.items() if name in figures},
        keys=list(sweep.parameters),
        rows=[_row(record, config) for record in ranked(records, config)],
        best=summary["best"],
        metric=sweep.metric,
        common_step=step,
        num_compared=len(points),
        num_trials=len(records),
        min_trials=MIN_TRIALS,
        exploits=[event for record in records for event in record.exploits],
        config_yaml=yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
    )
    return render(Page("sweep.html.j2", figures, values))


def curves(config: Config) -> dict[str, str]:
    """The title of each curve: both losses, and what decides where that is another figure."""
    unit = {"answers": "nats per token", "pairs": "mean over pairs", "labels": "mean over answers"}
    of = unit[config.training.records]
    titles = {"loss": f"Training loss, {of}", "eval_loss": f"Validation loss, {of}"}
    return {space.sweep_of(config).metric: space.sweep_of(config).metric, **titles}


def comparable(records: list[TrialRecord], metric: str) -> tuple[int | None, list[tuple[str, dict[str, Any], float]]]:
    """The step at which trials are compared, and (trial, parameters, value) of those that reported there."""
    reports = {record.name: {one["step"]: one[metric] for one in record.reports} for record in records}
    step = common_step([one for one in reports.values() if one])
    points = [
        (record.name, record.first_parameters, reports[record.name][step])
        for record in records
        if step is not None and step in reports[record.name]
    ]
    return step, points


def ranked(records: list[TrialRecord], config: Config) -> list[TrialRecord]:
    """The best trial first, those without a report last."""
    sweep = space.sweep_of(config)
    sign = 1 if space.mode_of(sweep) == "min" else -1

    def place(record: TrialRecord) -> tuple[bool, bool, float]:
        best = results.score(record, sweep)
        return record.status == "failed", best is None, sign * best[sweep.metric] if best else 0.0

    return sorted(records, key=place)


def _row(record: TrialRecord, config: Config) -> dict[str, Any]:
    sweep = space.sweep_of(config)
    best = results.score(record, sweep)
    return {
        "name": record.name,
        "values": [charts.show(record.parameters[key]) for key in sweep.parameters],
        "step": f"{record.reported:,}",
        "metric": "–" if best is None else f"{best[sweep.metric]:.4f}",
        "status": record.status if record.has_ended else "unfinished",
        "reason": record.reason or "",
    }


def key_figures(summary: dict[str, Any], metric: str) -> list[tuple[str, str, str]]:
    """(label, value, note) of the tiles."""
    best, counts = summary["best"], summary["trials"]
    saved = 1 - summary["steps"] / summary["steps_without_stopping"] if summary["steps_without_stopping"] else 0
    return [
        (f"Best {metric}", f"{best['value']:.4f}" if best else "–", best["trial"] if best else ""),
        ("Trials", str(sum(counts.values())), ", ".join(f"{count} {name}" for name, count in counts.items())),
        ("Steps", f"{summary['steps']:,}", f"{saved:.0%} fewer than all to their end" if saved > 0 else ""),
        ("Tokens", f"{summary['tokens']:,}", "trained on, as logged"),
        ("Wall time", show_duration(summary["seconds"]), "all sessions"),
    ]
