"""How much each parameter has to do with the metric: rank correlation, told only where there are enough trials.

All trials are judged at one step, the last that most of them reached: a trial that was stopped early is not compared
with the end of another. A number's strength is the absolute value of Spearman's rank correlation with the metric. Of a
value that is no number it is the correlation ratio of the metric's ranks: the root of the share of their variance that
lies between the values.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_TRIALS = 8


@dataclass(frozen=True)
class Importance:
    """How strongly one parameter goes with the metric."""

    key: str
    strength: float  # 0 to 1
    how: str


def common_step(reports: list[dict[int, float]]) -> int | None:
    """The last step at which at least two thirds of the trials reported; None without reports."""
    counts: dict[int, int] = defaultdict(int)
    for one in reports:
        for step in one:
            counts[step] += 1
    enough = [step for step, count in counts.items() if count >= 2 / 3 * len(reports)]
    return max(enough, default=None)


def importance(points: list[tuple[dict[str, Any], float]]) -> list[Importance]:
    """Of each parameter that varies, the strongest first; empty below MIN_TRIALS."""
    if len(points) < MIN_TRIALS:
        return []
    found = []
    metric = ranks([value for _, value in points])
    for key in points[0][0]:
        column = [parameters[key] for parameters, _ in points]
        if len(set(map(repr, column))) < 2 or metric.std() == 0:
            continue
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
            correlation = float(np.corrcoef(ranks(column), metric)[0, 1])
            how = f"{abs(correlation):.2f}, {'larger is worse' if correlation > 0 else 'larger is better'}"
            found.append(Importance(key, abs(correlation), how))
        else:
            ratio = correlation_ratio(list(map(repr, column)), metric)
            found.append(Importance(key, ratio, f"{ratio:.2f}"))
    return sorted(found, key=lambda one: -one.strength)


def ranks(values: list[float]) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    array = np.asarray(values, dtype=float)
    return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])


def correlation_ratio(groups: list[str], values: np.ndarray) -> float:
    """Root of the share of the variance of `values` that lies between the groups."""
    mean = values.mean()
    between = 0.0
    for group in set(groups):
        inside = values[[one == group for one in groups]]
        between += len(inside) * (inside.mean() - mean) ** 2
    return float(np.sqrt(between / ((values - mean) ** 2).sum()))
