"""Optuna through Ray Tune's OptunaSearch, with the ledger as its memory. Needs the extra "optuna"."""

from functools import partial
from typing import Any

from ray import tune
from ray.tune.search.optuna import OptunaSearch

from qlora_ray.config import Config
from qlora_ray.sweep import space
from qlora_ray.sweep.domain import domain
from qlora_ray.sweep.ledger import Ledger


class LedgerSearch(OptunaSearch):
    """Told of every trial that ended, gives those again that have not, and only then asks for new ones."""

    def __init__(self, config: Config, ledger: Ledger):
        sweep = space.sweep_of(config)
        self._config, self._ledger = config, ledger
        live = ledger.live()
        self._names = [record.name for record in live]
        # Another seed after each resumption: the same one would draw the first trials again.
        super().__init__(
            {key: _domain(config, key) for key in sweep.parameters}, metric=sweep.metric,
            mode=space.mode_of(sweep), seed=sweep.seed + len(ledger.trials),
            points_to_evaluate=[record.parameters for record in live] or None,
        )  # fmt: skip
        for record in ledger.trials.values():
            if record.has_ended and record.reports:
                self.add_evaluated_point(record.parameters, record.reports[-1][sweep.metric])

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The parameters of a trial, which is in the ledger before it is anywhere else."""
        point = super().suggest(trial_id)
        assert point is not None
        if self._names:
            return {"trial": self._names.pop(0), **point}
        name = space.trial_name(len(self._ledger.trials))
        point = space.as_meant(self._config, point)
        self._ledger.append("trial", trial=name, parameters=point)
        return {"trial": name, **point}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Only the last report of a trial counts."""


def _domain(config: Config, key: str) -> Any:
    sweep = space.sweep_of(config)
    parameter = sweep.parameters[key]
    if parameter.kind != "choice":
        return domain(parameter)
    return tune.choice([point[key] for point in map(partial(space.as_meant, config), space.varied(sweep, key))])
