"""What a sweep ends with: its best trial, that trial's adapter and config, and summary.json."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_ray.config import Config, SweepConfig, as_written
from qlora_ray.rundir import names
from qlora_ray.rundir.metrics import read_lines
from qlora_ray.rundir.record import read_json
from qlora_ray.storage import open_folder
from qlora_ray.sweep.capacity import Planned
from qlora_ray.sweep.ledger import Ledger, TrialRecord
from qlora_ray.sweep.space import config_of, mode_of, sweep_of


@dataclass(frozen=True)
class Best:
    """The best report of all trials."""

    trial: str
    step: int
    value: float
    parameters: dict[str, Any]


def score(record: TrialRecord, sweep: SweepConfig) -> dict[str, Any] | None:
    """The best report of a trial; None without one."""
    if not record.reports:
        return None
    sign = 1 if mode_of(sweep) == "min" else -1
    return min(record.reports, key=lambda report: sign * report[sweep.metric])


def find_best(ledger: Ledger, sweep: SweepConfig) -> Best | None:
    """The best trial that did not fail; with metric loss the last report counts, else the best one."""
    sign = 1 if mode_of(sweep) == "min" else -1
    found = []
    for record in ledger.trials.values():
        # adapter_best is of the best validation; the weights of a better training loss in between are nowhere.
        report = record.reports[-1] if sweep.metric == "loss" and record.reports else score(record, sweep)
        if report is not None and record.status != "failed":
            found.append((sign * report[sweep.metric], record.name, report))
    if not found:
        return None
    _, name, report = min(found, key=lambda one: one[:2])
    return Best(name, report["step"], report[sweep.metric], report["parameters"])


def adapter_of(run: Path, sweep: SweepConfig, trial: str) -> Path | None:
    """Where the best adapter of a trial lies; None where it was not written yet."""
    by_validation = sweep.metric.startswith("eval_")
    folder = run / names.TRIALS / trial / (names.ADAPTER_BEST if by_validation else names.ADAPTER)
    return folder if (folder / "adapter_model.safetensors").exists() else None


def promote(run: Path, config: Config, best: Best) -> str | None:
    """Copy the best adapter and its config to the run directory, whole or not at all; returns its path."""
    source = adapter_of(run, sweep_of(config), best.trial)
    if source is None:
        return None
    unfinished = run / ".adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for file in source.iterdir():  # not copytree, which turns a full disk into an error without its number
        shutil.copy2(file, unfinished)
    values = as_written(config_of(config, best.parameters))
    del values["sweep"]
    (unfinished / "train_config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    shutil.rmtree(run / "adapter", ignore_errors=True)
    unfinished.rename(run / "adapter")
    return str(run / "adapter")


def tokens_of(run: Path, trial: str) -> int:
    """Tokens that a trial has trained on, as logged."""
    return sum(line.get("num_tokens", 0) for line in read_lines(open_folder(str(run / names.TRIALS / trial))))


def steps_of(run: Path, record: TrialRecord) -> int:
    """Optimizer steps that a trial has taken."""
    steps = read_json(open_folder(str(run / names.TRIALS / record.name)) / names.SUMMARY).get("steps")
    return steps if steps is not None else record.reported


def write_summary(run: Path, ledger: Ledger, planned: Planned, status: str, reason: str | None) -> dict[str, Any]:
    """Promote the best adapter and write summary.json; returns it."""
    config, sweep = planned.config, sweep_of(planned.config)
    best = find_best(ledger, sweep)
    by_status: dict[str, int] = {}
    for record in ledger.trials.values():
        name = record.status if record.has_ended else "unfinished"
        by_status[name] = by_status.get(name, 0) + 1
    summary = {
        "status": status,
        "reason": reason,
        "metric": sweep.metric,
        "best": vars(best) if best else None,
        "adapter": promote(run, config, best) if best else None,
        "trials": by_status,
        "steps": sum(steps_of(run, record) for record in ledger.trials.values()),
        "steps_without_stopping": planned.reports.num_steps * len(ledger.trials),
        "tokens": sum(tokens_of(run, name) for name in ledger.trials),
        "exploits": sum(len(record.exploits) for record in ledger.trials.values()),
        "failed": {name: record.reason for name, record in ledger.trials.items() if record.status == "failed"},
        "seconds": round(ledger.seconds, 1),
    }
    (open_folder(str(run)) / names.SUMMARY).write_bytes(json.dumps(summary, indent=1, ensure_ascii=False).encode())
    return summary
