"""Plotly figures of a sweep. Imports plotly only when a figure is made."""

import html
import math
from typing import TYPE_CHECKING, Any

from qlora_ray.report.charts import GREY, PALETTE, layout
from qlora_ray.rundir.record import series
from qlora_ray.sweep.importance import Importance

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# From the best trial to the worst, each with enough contrast on white and on near-black.
SCALE = [(0.0, (47, 158, 110)), (0.5, (163, 138, 31)), (1.0, (200, 72, 63))]


def curves_chart(lines: dict[str, list[dict]], metric: str, exploits: dict[str, list[dict]]) -> "Figure | None":
    """One metric of all trials over each other; a ring marks where a trial went on from another's checkpoint."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=layout(height=360, x_title="step"))
    for i, (name, entries) in enumerate(lines.items()):
        steps, values = series(entries, metric)
        if not steps:
            continue
        colour = PALETTE[i % len(PALETTE)]
        few = len(steps) <= 30
        figure.add_scatter(
            x=steps, y=values, name=name, mode="lines+markers" if few else "lines",
            line={"color": colour, "width": 1.75, "dash": ["solid", "dot", "dash"][i // len(PALETTE) % 3]},
            marker={"size": 4}, hovertemplate="%{y:.4f}",
        )  # fmt: skip
        for exploit in exploits.get(name, []):
            at = [(step, value) for step, value in zip(steps, values, strict=True) if step >= exploit["step"]][:1]
            figure.add_scatter(
                x=[step for step, _ in at], y=[value for _, value in at], mode="markers", showlegend=False,
                marker={"size": 12, "color": "rgba(0,0,0,0)", "line": {"color": colour, "width": 2}},
                hovertemplate=f"{name} goes on from {exploit['donor']}, step {exploit['step']}<extra></extra>",
            )  # fmt: skip
    if not figure.data:
        return None
    positive = [value for trace in figure.data for value in trace.y]
    if min(positive) > 0 and max(positive) / min(positive) > 20:
        figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "entrywidth": 48}
    figure.update_layout(showlegend=len(lines) <= 24, hovermode="closest", legend=legend)
    return figure


def parallel_chart(points: list[tuple[str, dict[str, Any], float]], metric: str, mode: str) -> "Figure":
    """Parallel coordinates of (trial, parameters, value): an axis a parameter and one for the metric, a line a trial.

    Drawn as plain lines: plotly's own need WebGL code that the page's content security policy forbids.
    """
    import plotly.graph_objects as go

    keys = list(points[0][1])
    columns = [[point[1][key] for point in points] for key in keys] + [[point[2] for point in points]]
    axes = [Axis(column) for column in columns]
    names = [key.rsplit(".", 1)[-1] for key in keys] + [metric]
    figure = go.Figure(layout=layout(height=400))
    order = sorted(points, key=lambda point: point[2], reverse=mode == "min")  # the best on top
    for name, parameters, value in order:
        here = axes[-1].place(value)
        row = [axis.place(parameters[key]) for axis, key in zip(axes, keys, strict=False)] + [here]
        shown = "<br>".join(f"{html.escape(key)} {show(parameters[key])}" for key in keys)
        figure.add_scatter(
            x=list(range(len(axes))), y=row, mode="lines+markers", name=name, 
            line={"color": colour(here if mode == "min" else 1 - here), "width": 2},
            marker={"size": 5}, opacity=0.85,
            hovertemplate=f"<b>{name}</b>: {metric} {value:.4f}<br>{shown}<extra></extra>",
        )  # fmt: skip
    for i, axis in enumerate(axes):
        figure.add_shape(type="line", x0=i, x1=i, y0=0, y1=1, line={"color": GREY, "width": 1}, layer="below")
        side = {"xanchor": "left" if i == 0 else "right" if i == len(axes) - 1 else "center", "showarrow": False}
        figure.add_annotation(x=i, y=1.2, text=f"<b>{html.escape(names[i])}</b>", font={"size": 12}, **side)
        for place, text in axis.ticks():
            outside = {0.0: -0.06, 1.0: 1.06}.get(place)  # above and below the lines where there is room
            figure.add_annotation(
                x=i, y=place if outside is None else outside, text=html.escape(text), font={"size": 11}, **side
            )
    figure.update_xaxes(visible=False, range=[-0.06, len(axes) - 0.94])
    figure.update_yaxes(visible=False, range=[-0.1, 1.26])
    return figure


def importance_chart(found: list[Importance]) -> "Figure":
    """The strength of each parameter, 0 to 1, as bars."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=layout(height=50 + 38 * len(found)))
    figure.add_bar(
        x=[one.strength for one in found], y=[html.escape(one.key.rsplit(".", 1)[-1]) for one in found],
        orientation="h", width=0.56, marker={"color": PALETTE[0]}, text=[one.how for one in found],
        textposition="outside",
        cliponaxis=False, hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(range=[0, 1.7], tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=8)
    return figure


class Axis:
    """Places values of a column between 0 and 1: numbers by size (a decade or more: by logarithm), others evenly."""

    def __init__(self, column: list[Any]):
        self._numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in column)
        self._values: list[Any] = sorted(set(column)) if self._numbers else list(dict.fromkeys(map(show, column)))
        self._log = self._numbers and self._values[0] > 0 and self._values[-1] / self._values[0] > 10

    def place(self, value: Any) -> float:
        """Where a value stands, 0 at the bottom to 1 at the top."""
        if len(self._values) == 1:
            return 0.5
        if not self._numbers:
            return self._values.index(show(value)) / (len(self._values) - 1)
        low, high = self._values[0], self._values[-1]
        if self._log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of each value, or of both ends where there are many."""
        few = self._values if len(self._values) <= 5 else [self._values[0], self._values[-1]]
        return [(self.place(value), show(value)) for value in few]


def colour(place: float) -> str:
    """The colour of a trial by its place between best (0) and worst (1)."""
    for (left, low), (right, high) in zip(SCALE, SCALE[1:], strict=False):
        if place <= right:
            share = (place - left) / (right - left)
            mixed = (round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
            return f"rgb({', '.join(map(str, mixed))})"
    raise AssertionError(place)


def show(value: Any) -> str:
    """A value in few digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
