"""One run as one HTML page for people. Imports no torch, no ray."""

import math
import statistics
from pathlib import Path
from typing import Any

import yaml

from qlora_ray.report.charts import CURVES, build_charts, show_duration
from qlora_ray.rundir import names
from qlora_ray.rundir.record import (
    RunRecord,
    answers_by_prompt,
    data_statistics,
    dotted,
    is_right,
    memory,
    read_run,
    series,
    wall_seconds,
)
from qlora_ray.storage import open_folder

NUM_SAMPLES_OPEN = 8  # the rest is folded away
MISSING = "–"


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html in one rename, so that a reader never sees half a page."""
    return write_page(run_dir / names.REPORT, render_report(read_run(run_dir)))


def write_page(path: Path, page: str) -> Path:
    """Write a page whole or not at all, so that a reader never sees half of one."""
    (open_folder(str(path.resolve().parent)) / path.name).write_bytes(page.encode())
    return path


def render_report(run: RunRecord) -> str:
    """The page: self-contained, and forbidden by its own content security policy to load anything."""
    charts = build_charts(run)
    return render(
        "report.html.j2",
        charts,
        title=f"{run.name} · training report",
        run=run,
        status=run.summary.get("status", "unfinished"),
        figures=key_figures(run),
        curves=[curve for curve in CURVES if curve.metric in charts],
        samples=[{**sample, "is_right": is_right(sample)} for sample in run.samples],
        num_samples_open=NUM_SAMPLES_OPEN,
        learning=answers_by_prompt(run),
        data=data_statistics(run),
        memory=memory(run),
        versions=run.manifest.get("versions") or {},
        plan=plan_groups(run.plan),
        config_yaml=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
    )


def render(template: str, charts: dict[str, Any], **values: Any) -> str:
    """A template of assets/ with its charts and plotly itself inside."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup
    from plotly.io import to_json
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("qlora_ray", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(
        charts=charts.keys(),
        # plotly writes <, > and / as \u escapes, so no text in a chart can close the script element.
        charts_json={name: Markup(to_json(figure)) for name, figure in charts.items()},
        plotly_js=Markup(get_plotlyjs()),  # the only bundle in the Python package
        **values,
    )


def key_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """(label, value, note) of the tiles at the top: the summary's figures, or the logged ones of an unfinished run."""
    metrics = "loss", "eval_loss", "tokens_per_second", "peak_memory_gib", "mfu", "num_tokens", "num_label_tokens"
    logged = {name: series(run.metrics, name)[1] for name in metrics}
    known = {"steps": max((row["step"] for row in run.metrics if "step" in row), default=None)}
    known |= {name: logged[name][-1] for name in ("eval_loss", "num_tokens", "num_label_tokens") if logged[name]}
    if logged["loss"]:
        known |= {"first_loss": logged["loss"][0], "last_loss": logged["loss"][-1]}
    known |= {name: value for name, value in run.summary.items() if value is not None}
    best, eval_loss = known.get("best_eval_loss", min(logged["eval_loss"], default=None)), known.get("eval_loss")
    perplexity = None if eval_loss is None else math.exp(min(eval_loss, 700.0))  # exp(710) overflows
    median = {name: statistics.median(values) for name, values in logged.items() if values}
    failures = known.get("failures")
    return [
        ("Loss", change(known.get("first_loss"), known.get("last_loss"), ".3f"), "nats per token"),
        ("Validation loss", show(eval_loss, ".3f"), "" if best is None else f"best {best:.3f}"),
        ("Perplexity", show(perplexity, ",.2f"), "validation"),
        (
            "Exact match",
            change(known.get("exact_match_base"), known.get("exact_match_adapter"), ".0%"),
            "base → adapter",
        ),
        ("Steps", show(known["steps"], ",.0f"), ""),
        ("Wall time", show_duration(wall_seconds(run)), ""),
        ("Tokens", show(known.get("num_tokens"), ",.0f"), show(known.get("num_label_tokens"), ",.0f", " trained on")),
        (
            "Tokens per second",
            show(median.get("tokens_per_second"), ",.0f"),
            f"median, MFU {median['mfu']:.0%}" if "mfu" in median else "median",
        ),
        ("Peak memory", show(max(logged["peak_memory_gib"], default=None), ".2f", " GiB"), "per worker"),
        ("Failures survived", show(None if failures is None else len(failures), "d"), ""),
    ]


def plan_groups(plan: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, rows) of the plan: top-level scalars first, then a group for each nested dict, its keys dotted."""
    scalars = {key: value for key, value in plan.items() if not isinstance(value, dict)}
    groups = {"run": scalars, **{key: value for key, value in plan.items() if isinstance(value, dict)}}
    return [(name.replace("_", " "), rows) for name, group in groups.items() if (rows := dotted(group))]


def show(value: float | None, number_format: str, unit: str = "") -> str:
    """A figure with its unit; a dash for None."""
    return MISSING if value is None else f"{value:{number_format}}{unit}"


def change(before: float | None, after: float | None, number_format: str) -> str:
    """Two figures with an arrow between them; a dash where there is neither."""
    if before is None and after is None:
        return MISSING
    return f"{show(before, number_format)} → {show(after, number_format)}"
