"""Which settings vary between the trials of a sweep, and what decides between them."""

from typing import Any, Literal

from pydantic import Field, model_validator

from qlora_ray.config.section import Section


class Parameter(Section):
    """Where a setting's values come from: exactly one of these."""

    grid: list[Any] | None = Field(None, min_length=1)
    """Every value, with every combination of the other parameters (sweep.search=grid)."""
    choice: list[Any] | None = Field(None, min_length=1)
    """One of these."""
    uniform: tuple[float, float] | None = None
    """[low, high]."""
    loguniform: tuple[float, float] | None = None
    """[low, high], uniform in the logarithm: for learning rates."""
    randint: tuple[int, int] | None = None
    """[low, high], both included."""

    @property
    def kind(self) -> str:
        """Which of them is given, e.g. "loguniform"."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> list[Any]:
        """What a grid or choice lists; of a range its ends."""
        return list(getattr(self, self.kind))

    @model_validator(mode="after")
    def _is_one_range_that_is_not_empty(self):
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must be exactly one of {', '.join(type(self).model_fields)}; got {given or 'none'}")
        if self.kind in ("uniform", "loguniform", "randint"):
            low, high = self.values
            if not low < high:
                raise ValueError(f"is an empty range: {low:g} is not below {high:g}")
            if self.kind == "loguniform" and low <= 0:
                raise ValueError(f"needs a range above 0, since its logarithm is taken; got {low:g}")
        return self


class AshaOptions(Section):
    """When a bad trial is stopped, under the names of Ray Tune's ASHAScheduler."""

    grace_period: int | None = Field(None, ge=1)
    """Steps that every trial gets; default: up to its first report."""
    reduction_factor: float = Field(3, gt=1)
    """Of the trials that reach a rung, one in so many goes on; rungs are grace_period times powers of this."""


class PbtOptions(Section):
    """When a bad trial goes on from a good one, under the names of Ray Tune's PopulationBasedTraining."""

    perturbation_interval: int | None = Field(None, ge=1)
    """Steps between exploits; default: training.eval_every_steps."""
    quantile_fraction: float = Field(0.25, gt=0, le=0.5)
    """The worst share of the trials goes on from a trial of the best share."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """Chance that a parameter is drawn anew instead of changed by a factor of 0.8 or 1.2."""
    synch: bool = False
    """Let every trial reach the same step before any exploits; else each decides by what is known then."""


class SweepConfig(Section):
    """Which settings vary between trials, and what decides: [sweeps.md](sweeps.md)."""

    parameters: dict[str, Parameter] = Field(min_length=1)
    """Any dotted key of this file to grid, choice, uniform, loguniform or randint."""
    metric: Literal[
        "eval_loss", "eval_perplexity", "loss", "exact_match_adapter", "eval_rewards/accuracies",
        "eval_rewards/margins", "eval_rewards/chosen", "eval_logps/chosen",
    ] = "eval_loss"  # fmt: skip
    """What decides between trials: the lowest loss or perplexity, of the others the highest."""
    search: Literal["random", "grid", "optuna"] = "random"
    """random and grid know all trials from the start; optuna (extra "optuna") learns from those that ended."""
    num_trials: int | None = Field(None, ge=1)
    """Trials of random and optuna (default 8); a grid's number follows from its values."""
    scheduler: Literal["fifo", "asha", "pbt"] = "fifo"
    """fifo: every trial to its end. asha: bad ones are stopped early. pbt: bad ones go on from good ones' weights."""
    asha: AshaOptions = AshaOptions()
    """Of sweep.scheduler=asha."""
    pbt: PbtOptions = PbtOptions()
    """Of sweep.scheduler=pbt."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides which trials there are."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials that run at a time; default: as many as the cluster has room for."""
    time_budget_seconds: float | None = Field(None, gt=0)
    """Wall time of the sweep, resumptions together; then trials stop with a checkpoint."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens that all trials together may train on; then they stop with a checkpoint."""
    max_failed_trials: int = Field(3, ge=0)
    """A sweep with more failed trials than this ends."""

    @model_validator(mode="after")
    def _parts_fit_together(self):
        for key, parameter in self.parameters.items():
            if self.search == "grid" and parameter.kind != "grid":
                raise ValueError(
                    f"sweep.search=grid: {key} is {parameter.kind}. List its values with grid, or use random."
                )
            if self.search != "grid" and parameter.kind == "grid":
                raise ValueError(f"sweep.search={self.search}: {key} is a grid. Use choice, or sweep.search=grid.")
            if self.search == "optuna" and any(isinstance(value, list | dict) for value in parameter.values):
                raise ValueError(f"sweep.search=optuna: {key} lists a list. It knows texts and numbers; use random.")
        if self.search == "grid" and self.num_trials is not None:
            raise ValueError("sweep.num_trials: a grid has as many trials as combinations. Leave it out.")
        if self.search == "optuna" and self.scheduler == "pbt":
            raise ValueError("sweep.scheduler=pbt: finds its own values while it runs. Use sweep.search=random.")
        return self
