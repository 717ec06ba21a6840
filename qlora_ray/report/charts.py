"""Plotly figures of one run or several. Imports plotly only when a figure is made."""

import html
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_ray.rundir.record import RunRecord, memory, series, time_split

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Mid-tones with enough contrast on white and on near-black; all other colours are CSS variables in the template.
PALETTE = ["#3f87e5", "#e5812b", "#2f9e6e", "#c25bb5", "#c8483f", "#7f6bd6", "#1d9bb3", "#a38a1f"]
BLUE, ORANGE, GREY = "#3f87e5", "#e5812b", "#8a8f98"


class Curve(NamedTuple):
    """How one metric is drawn."""

    metric: str
    title: str
    tick_format: str
    hover_format: str
    is_noisy: bool  # draws a smoothed line over the raw one


CURVES = [
    Curve("rewards/margins", "Reward of chosen over rejected", "", ".3f", True),
    Curve("rewards/accuracies", "Share of pairs whose chosen answer has the higher reward", ".0%", ".1%", True),
    Curve("kl", "Distance from the reference, nats an answer", "", ".3f", True),
    Curve("learning_rate", "Learning rate", "~e", ".3e", False),
    Curve("grad_norm", "Gradient norm", "", ".3f", True),
    Curve("peak_memory_gib", "Peak memory, GiB", "", ".2f", False),
    Curve("tokens_per_second", "Tokens per second", "~s", ",.0f", True),
    Curve("samples_per_second", "Samples per second", "", ",.2f", True),
    Curve("step_seconds", "Seconds per step", "", ".3f", True),
]


def build_charts(run: RunRecord) -> "dict[str, Figure]":
    """Plotly figures by name; a metric that was never logged has none."""
    charts = {}
    if series(run.metrics, "loss")[0] or series(run.metrics, "eval_loss")[0]:
        charts["loss"] = loss_chart(run)
    for curve in CURVES:
        if series(run.metrics, curve.metric)[0]:
            charts[curve.metric] = curve_chart(curve, run)
    if split := time_split(run):
        charts["seconds"] = seconds_chart(split)
    found = memory(run)
    if found["parts"] and found["measured"] is not None:
        charts["memory"] = memory_chart(found)
    return charts


def loss_chart(run: RunRecord) -> "Figure":
    """Training and validation loss over steps, with the failures that were survived."""
    import plotly.graph_objects as go

    steps, losses = series(run.metrics, "loss")
    eval_steps, eval_losses = series(run.metrics, "eval_loss")
    figure = go.Figure(layout=layout(height=380, x_title="step"))
    figure.add_scatter(x=steps, y=losses, name="training", opacity=0.4, line={"color": BLUE, "width": 1})
    figure.add_scatter(x=steps, y=smooth(losses), name="training, smoothed", line={"color": BLUE, "width": 2.25})
    if eval_steps:
        style = {"line": {"color": ORANGE, "width": 2.25}, "marker": {"color": ORANGE, "size": 7}}
        figure.add_scatter(
            x=eval_steps, y=eval_losses, name="validation", mode="lines+markers", cliponaxis=False, **style
        )
    for event in (run.summary.get("failures") or []) + (run.summary.get("interruptions") or []):
        if event.get("step") is not None:
            figure.add_vline(x=event["step"], line={"color": GREY, "width": 1, "dash": "dot"})
    figure.update_traces(hovertemplate="%{y:.4f}")
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    figure.update_xaxes(range=[min(steps + eval_steps), max(steps + eval_steps)])
    figure.update_layout(showlegend=True, hovermode="x unified", legend=legend)
    return figure


def curve_chart(curve: Curve, run: RunRecord) -> "Figure":
    """One metric over steps, and what validations found of it."""
    import plotly.graph_objects as go

    steps, values = series(run.metrics, curve.metric)
    eval_steps, of_validation = series(run.metrics, f"eval_{curve.metric}")
    figure = go.Figure(layout=layout(height=210))
    hover = f"step %{{x:,}}<br><b>%{{y:{curve.hover_format}}}</b><extra></extra>"
    raw_style = {"opacity": 0.4, "line": {"color": BLUE, "width": 1}} if curve.is_noisy else {"line": {"color": BLUE}}
    figure.add_scatter(x=steps, y=values, hovertemplate=hover, **raw_style)
    if curve.is_noisy:
        figure.add_scatter(x=steps, y=smooth(values), hoverinfo="skip", line={"color": BLUE, "width": 2})
    if eval_steps:
        held_out = hover.replace("<extra></extra>", "<extra>validation</extra>")
        style = {"line": {"color": ORANGE, "width": 2}, "marker": {"color": ORANGE, "size": 5}}
        figure.add_scatter(x=eval_steps, y=of_validation, mode="lines+markers", hovertemplate=held_out, **style)
    figure.update_yaxes(tickformat=curve.tick_format, rangemode="tozero", nticks=5)
    return figure


def seconds_chart(phases: dict[str, float]) -> "Figure":
    """Seconds by phase, as bars with their share of the sum."""
    import plotly.graph_objects as go

    names, total = list(phases), sum(phases.values())
    shares = [seconds / total for seconds in phases.values()]
    figure = go.Figure(layout=layout(height=40 + 38 * len(phases)))
    figure.add_bar(
        x=list(phases.values()), y=[html.escape(name.replace("_", " ")) for name in names], orientation="h",
        text=[show_duration(seconds) for seconds in phases.values()], customdata=shares,
        textposition="outside", cliponaxis=False, marker={"color": BLUE}, width=0.56,
        hovertemplate="%{y}: %{x:,.1f} s, %{customdata:.1%}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(visible=False, range=[0, 1.6 * max(phases.values())])  # room for the label of the longest bar
    figure.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=8)
    return figure


def memory_chart(found: dict[str, Any]) -> "Figure":
    """The forecast, part on part, over what was measured."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=layout(height=170, x_title="GiB a worker"))
    style = {"orientation": "h", "width": 0.56, "hovertemplate": "%{fullData.name}: %{x:.3f} GiB<extra></extra>"}
    for colour, (part, value) in zip(PALETTE, found["parts"].items(), strict=False):
        figure.add_bar(y=["forecast"], x=[value], name=html.escape(part.replace("_", " ")), marker={"color": colour},
                       **style)  # fmt: skip
    measured = {"name": "measured", "marker": {"color": GREY}, "showlegend": False}
    figure.add_bar(y=["measured peak"], x=[found["measured"]], **measured, **style)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=8)
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
    figure.update_layout(barmode="stack", showlegend=True, legend=legend)
    return figure


def overlay_chart(runs: list[RunRecord], metric: str, number_format: str, title: str = "") -> "Figure | None":
    """One metric of several runs in one chart; None where no run has it."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=layout(height=320, x_title="step"))
    for i, run in enumerate(runs):
        steps, values = series(run.metrics, metric)
        if not steps:
            continue
        few = len(steps) <= 30
        figure.add_scatter(
            x=steps, y=values if few else smooth(values), name=html.escape(run.name),
            mode="lines+markers" if few else "lines", line={"color": PALETTE[i % len(PALETTE)], "width": 2},
            marker={"size": 5}, hovertemplate=f"%{{y:{number_format}}}",
        )  # fmt: skip
    if not figure.data:
        return None
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    figure.update_yaxes(tickformat="~g")  # else a curve that does not move has ticks of twenty digits
    figure.update_layout(showlegend=True, hovermode="x unified", legend=legend)
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


def show_duration(seconds: float | None) -> str:
    """Seconds as people say them; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def layout(height: int, x_title: str = "") -> dict[str, Any]:
    """What all charts share: `height` in pixels, no background, thin axes."""
    title = {"title": {"text": x_title, "standoff": 8}} if x_title else {}
    axis = {"zeroline": False, "automargin": True, "fixedrange": False}
    return {
        "template": "none", "height": height, "showlegend": False, "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8}, "font": {"size": 12},
        "xaxis": {**axis, "showgrid": False, "nticks": 8, **title},
        "yaxis": axis,
    }  # fmt: skip
