"""A run directory as one HTML page for people: curves, sample answers, plan and config. Imports no torch, no ray."""

import argparse
import html
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Mid-tones with enough contrast on white and on near-black; all other colours are CSS variables in the template.
BLUE, ORANGE, GREY = "#3f87e5", "#e5812b", "#8a8f98"
NUM_SAMPLES_OPEN = 8  # the rest is folded away
MISSING = "–"


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says about a run."""

    name: str
    config: dict
    plan: dict
    summary: dict
    metrics: list[dict]
    samples: list[dict] = field(default_factory=list)


class Curve(NamedTuple):
    metric: str
    title: str
    tick_format: str
    hover_format: str
    is_noisy: bool  # draws a smoothed line over the raw one


CURVES = [
    Curve("learning_rate", "Learning rate", "~e", ".3e", False),
    Curve("grad_norm", "Gradient norm", "", ".3f", True),
    Curve("peak_memory_gib", "Peak memory, GiB", "", ".2f", False),
    Curve("tokens_per_second", "Tokens per second", "~s", ",.0f", True),
    Curve("samples_per_second", "Samples per second", "", ",.2f", True),
    Curve("step_seconds", "Seconds per step", "", ".3f", True),
]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory; only metrics.jsonl must exist. Raises ValueError for a broken file."""
    config_file = run_dir / "config.yaml"
    return RunRecord(
        name=run_dir.resolve().name,
        config=(yaml.safe_load(config_file.read_text("utf-8")) or {}) if config_file.exists() else {},
        plan=_read_json(run_dir / "plan.json", missing={}),
        summary=_read_json(run_dir / "summary.json", missing={}),
        metrics=_read_metrics(run_dir / "metrics.jsonl"),
        samples=_read_json(run_dir / "samples.json", missing=[]),
    )


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html in one rename, so that a reader never sees half a page."""
    path = run_dir / "report.html"
    unfinished = path.with_name(f".report.html.{os.getpid()}")
    try:
        unfinished.write_text(render_report(read_run(run_dir)), "utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render_report(run: RunRecord) -> str:
    """The page: self-contained, and forbidden by its own content security policy to load anything."""
    from importlib.resources import files

    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.io import to_json
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("qlora_ray").joinpath("assets/report.html.j2").read_text("utf-8"))
    charts = build_charts(run)
    return template.render(
        run=run,
        status=run.summary.get("status", "unfinished"),
        figures=key_figures(run),
        curves=[curve for curve in CURVES if curve.metric in charts],
        samples=[{**sample, "is_right": is_right(sample)} for sample in run.samples],
        num_samples_open=NUM_SAMPLES_OPEN,
        plan=plan_groups(run.plan),
        config_yaml=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        charts=charts.keys(),
        # plotly writes <, > and / as \u escapes, so no text in a chart can close the script element.
        charts_json={name: Markup(to_json(figure)) for name, figure in charts.items()},
        plotly_js=Markup(get_plotlyjs()),  # the only bundle in the Python package
    )


def key_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """(label, value, note) of the tiles at the top: the summary's figures, or the logged ones of an unfinished run."""
    names = "loss", "eval_loss", "tokens_per_second", "peak_memory_gib", "mfu", "num_tokens", "num_label_tokens"
    logged = {name: _series(run.metrics, name)[1] for name in names}
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
        ("Loss", _change(known.get("first_loss"), known.get("last_loss"), ".3f"), "nats per token"),
        ("Validation loss", _show(eval_loss, ".3f"), "" if best is None else f"best {best:.3f}"),
        ("Perplexity", _show(perplexity, ",.2f"), "validation"),
        (
            "Exact match",
            _change(known.get("exact_match_base"), known.get("exact_match_adapter"), ".0%"),
            "base → adapter",
        ),
        ("Steps", _show(known["steps"], ",.0f"), ""),
        ("Wall time", show_duration(_wall_seconds(run)), ""),
        ("Tokens", _show(known.get("num_tokens"), ",.0f"), _show(known.get("num_label_tokens"), ",.0f", " trained on")),
        (
            "Tokens per second",
            _show(median.get("tokens_per_second"), ",.0f"),
            f"median, MFU {median['mfu']:.0%}" if "mfu" in median else "median",
        ),
        ("Peak memory", _show(max(logged["peak_memory_gib"], default=None), ".2f", " GiB"), "per worker"),
        ("Failures survived", _show(None if failures is None else len(failures), "d"), ""),
    ]


def build_charts(run: RunRecord) -> "dict[str, Figure]":
    """Plotly figures by name; a metric that was never logged has none."""
    charts = {}
    if _series(run.metrics, "loss")[0] or _series(run.metrics, "eval_loss")[0]:
        charts["loss"] = loss_chart(run)
    for curve in CURVES:
        steps, values = _series(run.metrics, curve.metric)
        if steps:
            charts[curve.metric] = curve_chart(curve, steps, values)
    seconds = run.summary.get("seconds") or {}
    if phases := {name: value for name, value in seconds.items() if name != "total" and value > 0}:
        charts["seconds"] = seconds_chart(phases)
    return charts


def loss_chart(run: RunRecord) -> "Figure":
    import plotly.graph_objects as go

    steps, losses = _series(run.metrics, "loss")
    eval_steps, eval_losses = _series(run.metrics, "eval_loss")
    figure = go.Figure(layout=_layout(height=380, x_title="step"))
    figure.add_scatter(x=steps, y=losses, name="training", opacity=0.4, line={"color": BLUE, "width": 1})
    figure.add_scatter(x=steps, y=smooth(losses), name="training, smoothed", line={"color": BLUE, "width": 2.25})
    if eval_steps:
        style = {"line": {"color": ORANGE, "width": 2.25}, "marker": {"color": ORANGE, "size": 7}}
        figure.add_scatter(
            x=eval_steps, y=eval_losses, name="validation", mode="lines+markers", cliponaxis=False, **style
        )
    for failure in run.summary.get("failures") or []:
        if failure.get("step") is not None:
            figure.add_vline(x=failure["step"], line={"color": GREY, "width": 1, "dash": "dot"})
    figure.update_traces(hovertemplate="%{y:.4f}")
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    figure.update_xaxes(range=[min(steps + eval_steps), max(steps + eval_steps)])
    figure.update_layout(showlegend=True, hovermode="x unified", legend=legend)
    return figure


def curve_chart(curve: Curve, steps: list[int], values: list[float]) -> "Figure":
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout(height=210))
    hover = f"step %{{x:,}}<br><b>%{{y:{curve.hover_format}}}</b><extra></extra>"
    raw_style = {"opacity": 0.4, "line": {"color": BLUE, "width": 1}} if curve.is_noisy else {"line": {"color": BLUE}}
    figure.add_scatter(x=steps, y=values, hovertemplate=hover, **raw_style)
    if curve.is_noisy:
        figure.add_scatter(x=steps, y=smooth(values), hoverinfo="skip", line={"color": BLUE, "width": 2})
    figure.update_yaxes(tickformat=curve.tick_format, rangemode="tozero", nticks=5)
    return figure


def seconds_chart(phases: dict[str, float]) -> "Figure":
    import plotly.graph_objects as go

    names, total = list(phases), sum(phases.values())
    shares = [seconds / total for seconds in phases.values()]
    figure = go.Figure(layout=_layout(height=40 + 38 * len(phases)))
    figure.add_bar(
        x=list(phases.values()), y=[html.escape(name.replace("_", " ")) for name in names], orientation="h",
        text=[show_duration(seconds) for seconds in phases.values()], customdata=shares,
        textposition="outside", cliponaxis=False, marker={"color": BLUE}, width=0.56,
        hovertemplate="%{y}: %{x:,.1f} s, %{customdata:.1%}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[0, 1.6 * max(phases.values())])  # room for the label of the longest bar
    figure.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=8)
    return figure


def smooth(values: list[float]) -> list[float]:
    """Mean of the middle half of a centred window, about 4 % of the curve: one slow or odd step does not bend it."""
    smoothed = []
    for i in range(len(values)):
        reach = min(len(values) // 50, i)  # narrow at the start, where a loss falls fast
        window = sorted(values[i - reach : i + reach + 1])
        quarter = len(window) // 4
        smoothed.append(statistics.fmean(window[quarter : len(window) - quarter]))
    return smoothed


def plan_groups(plan: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, rows) of the plan: top-level scalars first, then a group for each nested dict, its keys dotted."""
    scalars = {key: value for key, value in plan.items() if not isinstance(value, dict)}
    groups = {"run": scalars, **{key: value for key, value in plan.items() if isinstance(value, dict)}}
    return [(name.replace("_", " "), rows) for name, group in groups.items() if (rows := _dotted(group))]


def is_right(sample: dict) -> bool | None:
    """Whether the adapter's answer is the expected one, spaces at its ends aside; None if there is none to compare."""
    if sample.get("expected") is None or sample.get("adapter") is None:
        return None
    return sample["adapter"].strip() == sample["expected"].strip()


def show_duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _layout(height: int, x_title: str = "") -> dict[str, Any]:
    title = {"title": {"text": x_title, "standoff": 8}} if x_title else {}
    axis = {"zeroline": False, "automargin": True, "fixedrange": False}
    return {
        "template": "none", "height": height, "showlegend": False, "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8}, "font": {"size": 12},
        "xaxis": {**axis, "showgrid": False, "nticks": 8, **title},
        "yaxis": axis,
    }  # fmt: skip


def _series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric in order of step; of a step that ran again after a failure, the last run counts."""
    by_step = {row["step"]: row[name] for row in metrics if row.get(name) is not None and "step" in row}
    steps = sorted(step for step, value in by_step.items() if math.isfinite(value))
    return steps, [by_step[step] for step in steps]


def _wall_seconds(run: RunRecord) -> float | None:
    if seconds := run.summary.get("seconds"):
        return seconds.get("total", sum(seconds.values()))
    times = [row["time"] for row in run.metrics if "time" in row]
    return max(times) - min(times) if times else None


def _show(value: float | None, number_format: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{number_format}}{unit}"


def _change(before: float | None, after: float | None, number_format: str) -> str:
    if before is None and after is None:
        return MISSING
    return f"{_show(before, number_format)} → {_show(after, number_format)}"


def _dotted(group: dict, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in group.items():
        if isinstance(value, dict) and value:
            rows += _dotted(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows


def _read_json(path: Path, missing: Any) -> Any:
    if not path.exists():
        return missing
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def _read_metrics(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):  # else the run is writing this line now, or died in the middle of it
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_ray.report", description="Write report.html of a run.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the directory that holds metrics.jsonl")
    run_dir = parser.parse_args(argv).run_dir
    if not (run_dir / "metrics.jsonl").is_file():
        reason = "has no metrics.jsonl" if run_dir.is_dir() else "is not a directory"
        print(f"RUN_DIR={run_dir}: {reason}. Give <ray.storage_path>/<ray.run_name>.", file=sys.stderr)
        return 2
    try:
        print(write_report(run_dir))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
