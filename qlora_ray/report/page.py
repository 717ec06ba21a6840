"""One run as one HTML page for people. Imports no torch, no ray."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NUM_SAMPLES_OPEN = 8  # the rest is folded away
MISSING = "–"


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html in one rename, so that a reader never sees half a page."""
    return write_page(run_dir / names.REPORT, render_report(read_run(run_dir)))


def write_page(path: Path, page: str) -> Path:
    """Write a page whole or not at all, so that a reader never sees half of one."""
    (open_folder(str(path.resolve().parent)) / path.name).write_bytes(page.encode())
    return path


@dataclass(frozen=True)
class Page:
    """A template of assets/, the charts in it, and what else it shows."""

    template: str
    charts: "dict[str, Figure]"
    values: dict[str, Any]


def render_report(run: RunRecord) -> str:
    """The page: self-contained, and forbidden by its own content security policy to load anything."""
    return render(report_page(run))


def report_page(run: RunRecord) -> Page:
    """What the page of a run shows."""
    charts = build_charts(run)
    values = dict(
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
    return Page("report.html.j2", charts, values)


def render(page: Page) -> str:
    """A page with its charts and plotly itself inside: it loads nothing."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    plotly_js = Markup(get_plotlyjs()) if page.charts else ""  # the only bundle in the Python package
    return _template(page).render(charts_json=charts_json(page), plotly_js=plotly_js, **page.values)


def render_live(page: Page, stamp: str) -> str:
    """A page that asks its server for what is new since `stamp`, and for plotly."""
    return _template(page).render(charts_json=charts_json(page), stamp=stamp, is_live=True, **page.values)


def render_part(page: Page, stamp: str) -> str:
    """What such a page asks for: JSON with the new stamp, its content as HTML, and its charts."""
    html = _template(page).render(charts_json=charts_json(page), is_part=True, **page.values)
    charts = ", ".join(f"{json.dumps(name)}: {figure}" for name, figure in charts_json(page).items())
    return f'{{"stamp": {json.dumps(stamp)}, "html": {json.dumps(html)}, "charts": {{{charts}}}}}'


def charts_json(page: Page) -> dict[str, Any]:
    """Each chart as plotly has it: <, > and / are \\u escapes, so that no text can close the script element."""
    from markupsafe import Markup
    from plotly.io import to_json

    return {name: Markup(to_json(figure)) for name, figure in page.charts.items()}


def _template(page: Page) -> Any:
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("qlora_ray", "assets")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(charts=page.charts.keys(), duration=show_duration)
    return environment.get_template(page.template)


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
    has_pairs = any("rewards/margins" in row for row in run.metrics)
    unit = "mean over pairs or answers" if has_pairs else "nats per token"
    perplexity = None if eval_loss is None or has_pairs else math.exp(min(eval_loss, 700.0))  # exp(710) overflows
    accuracies, margins = (series(run.metrics, f"eval_rewards/{name}")[1] for name in ("accuracies", "margins"))
    median = {name: statistics.median(values) for name, values in logged.items() if values}
    failures = known.get("failures")
    return [
        ("Loss", change(known.get("first_loss"), known.get("last_loss"), ".3f"), unit),
        ("Validation loss", show(eval_loss, ".3f"), "" if best is None else f"best {best:.3f}"),
        ("Pairs judged right", show(accuracies[-1], ".0%"), "validation")
        if accuracies
        else ("Margin of rewards", show(margins[-1] if margins else None, ".3f"), "validation")
        if has_pairs
        else ("Perplexity", show(perplexity, ",.2f"), "validation"),
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
