"""What a run directory says about a run: read, and never guessed. Imports no torch, no ray."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora_ray.errors import ConfigError
from qlora_ray.rundir import names
from qlora_ray.rundir.metrics import read_lines
from qlora_ray.storage import Folder, open_folder


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says about a run."""

    name: str
    config: dict
    plan: dict
    summary: dict
    metrics: list[dict]
    samples: list[dict] = field(default_factory=list)
    samples_by_step: list[dict] = field(default_factory=list)
    manifest: dict = field(default_factory=dict)
    pairs: list[dict] = field(default_factory=list)


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory; only metrics.jsonl must exist. Raises ConfigError for a damaged file."""
    run = open_folder(str(run_dir.resolve()))
    config = run / names.CONFIG
    return RunRecord(
        name=run.name,
        config=(yaml.safe_load(config.read_bytes()) or {}) if config.exists() else {},
        plan=read_json(run / names.PLAN),
        summary=read_json(run / names.SUMMARY),
        metrics=read_lines(run),
        samples=read_json(run / names.SAMPLES, missing=[]),
        samples_by_step=read_lines(run, names.SAMPLES_BY_STEP),
        manifest=read_json(run / names.MANIFEST),
        pairs=read_json(run / names.PAIRS, missing=[]),
    )


def read_json(file: Folder, missing: Any = None) -> Any:
    """What a JSON file of a run directory holds; `missing`, by default {}, where there is none. Raises ConfigError."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return {} if missing is None else missing
    except ValueError as error:
        raise ConfigError(f"{file.path}: not JSON ({error}).") from None


def series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric in order of step; of a step that ran again after a failure, the last run counts."""
    by_step = {row["step"]: row[name] for row in metrics if row.get(name) is not None and "step" in row}
    steps = sorted(step for step, value in by_step.items() if math.isfinite(value))
    return steps, [by_step[step] for step in steps]


def wall_seconds(run: RunRecord) -> float | None:
    """Seconds from command to end; of a run that still goes on, those its metrics span; None where nothing is known."""
    if seconds := run.summary.get("seconds"):
        return float(seconds.get("total", 0.0))
    times = [row["time"] for row in run.metrics if "time" in row]
    return max(times) - min(times) if times else None


# Of a step; per step in metrics.jsonl, as <phase>_seconds.
PHASES = ("data", "forward", "backward", "communication", "optimizer")
BETWEEN = ("reference", "evaluation", "checkpoint")  # between steps; each time in a line of its own


def time_split(run: RunRecord) -> dict[str, float]:
    """Seconds of the whole run by where they went; what no mark covers is "other"."""
    seconds = run.summary.get("seconds") or {}
    split = {"start": seconds.get("to_first_step", 0.0)}
    steps, step_seconds = series(run.metrics, "step_seconds")
    num_steps = dict(zip(steps, _differences(steps), strict=True))
    marked = 0.0
    for phase in PHASES:
        spent = sum(
            value * num_steps[step] for step, value in zip(*series(run.metrics, f"{phase}_seconds"), strict=True)
        )
        split[phase], marked = spent, marked + spent
    if not marked:
        split["training"] = sum(value * num_steps[step] for step, value in zip(steps, step_seconds, strict=True))
    for phase in BETWEEN:
        split[phase] = sum(row.get(f"{phase}_seconds", 0.0) for row in run.metrics)
    if total := seconds.get("total"):
        split["other"] = max(0.0, total - sum(split.values()))
    return {phase: spent for phase, spent in split.items() if spent > 0}


def memory(run: RunRecord) -> dict[str, Any]:
    """GiB a worker: the plan's forecast by part, its sum, and the most that was measured."""
    forecast = run.plan.get("memory_forecast_gib") or {}
    parts = {name: value for name, value in forecast.items() if name != "while_loading"}
    return {
        "parts": parts,
        "forecast": sum(parts.values()) if parts else None,
        "while_loading": forecast.get("while_loading"),
        "measured": max(series(run.metrics, "peak_memory_gib")[1], default=None),
    }


def data_statistics(run: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of what is known of the rows; empty for a run without a manifest."""
    data = run.manifest.get("data") or {}
    rows = [(name.removeprefix("num_").replace("_", " "), f"{value:,}") for name, value in data.items()
            if isinstance(value, int) and name != "pairs"]  # fmt: skip
    if data.get("num_tokens") and data.get("num_label_tokens") is not None:
        rows.append(("share of tokens trained on", f"{data['num_label_tokens'] / data['num_tokens']:.0%}"))
    if data.get("num_rows") and data.get("num_tokens"):
        rows.append(("tokens a row, mean", f"{data['num_tokens'] / data['num_rows']:.1f}"))
    if data.get("fingerprint"):
        rows.append(("fingerprint", data["fingerprint"]))
    return rows


def answers_by_prompt(run: RunRecord) -> list[dict]:
    """The prompts that were answered at each validation: {prompt, expected, answers: [(step, text, is right)]}."""
    prompts: dict[str, dict] = {}
    for sample in run.samples_by_step:
        found = prompts.setdefault(sample["prompt"], {"expected": sample.get("expected"), "answers": {}})
        found["answers"][sample["step"]] = sample["adapter"]  # of a step done again, the last run counts
    return [
        {
            "prompt": prompt,
            "expected": found["expected"],
            "answers": [
                (step, text, is_right({"expected": found["expected"], "adapter": text}))
                for step, text in sorted(found["answers"].items())
            ],
        }
        for prompt, found in prompts.items()
    ]


def is_right(sample: dict) -> bool | None:
    """Whether the adapter's answer is the expected one, spaces at its ends aside; None if there is none to compare."""
    if sample.get("expected") is None or sample.get("adapter") is None:
        return None
    return sample["adapter"].strip() == sample["expected"].strip()


def dotted(group: dict, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of a nested dict."""
    rows = []
    for key, value in group.items():
        if isinstance(value, dict) and value:
            rows += dotted(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows


def _differences(steps: list[int]) -> list[int]:
    return [step - before for before, step in zip([0, *steps], steps, strict=False)]
