"""From parameters to trials: which there are, and the config of each. Pure: no torch, no Ray, no I/O."""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

from qlora_ray.config import OF_PAIRS, Config, Parameter, SweepConfig, as_written, make_config
from qlora_ray.errors import ConfigError

NUM_TRIALS = 8  # of a random search or optuna that does not say
NOT_TO_VARY = ("sweep", "ray.address", "ray.storage_path", "ray.run_name", "logging", "watchdog")
# What a trial may change when it goes on from another's checkpoint: all that shapes neither weights nor batches.
PERTURBABLE = (
    "training.learning_rate", "training.weight_decay", "training.max_grad_norm", "training.loraplus_lr_ratio",
    "training.neftune_noise_alpha", "training.warmup_ratio", "training.lr_schedule", "model.lora_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One point of the space; `parameters` by dotted key."""

    name: str
    parameters: dict[str, Any]


def known_trials(config: Config) -> list[Trial]:
    """All trials of a grid or a random search, the same for the same config; for optuna none. Raises ConfigError."""
    sweep = sweep_of(config)
    check_keys(sweep)
    if sweep.search == "optuna":
        for corner in corners(sweep):
            config_of(config, corner)
        return []
    if sweep.search == "grid":
        listed = [[(key, value) for value in one.values] for key, one in sweep.parameters.items()]
        points = [dict(point) for point in itertools.product(*listed)]
        if sweep.scheduler == "asha":  # which stops none of a row in which each is better than those before
            random.Random(sweep.seed).shuffle(points)
    else:
        chance = random.Random(sweep.seed)
        points = [
            {key: draw(one, chance) for key, one in sweep.parameters.items()}
            for _ in range(sweep.num_trials or NUM_TRIALS)
        ]
    points = [as_meant(config, point) for point in points]
    return [Trial(trial_name(i), point) for i, point in enumerate(points)]


def trial_name(number: int) -> str:
    """Name of the trial `number` (from 0): t0000, t0001, ..."""
    return f"t{number:04d}"


def num_trials(config: Config) -> int:
    """How many trials the sweep has. Raises ConfigError where there is no sweep."""
    sweep = sweep_of(config)
    if sweep.search == "grid":
        return math.prod(len(one.values) for one in sweep.parameters.values())
    return sweep.num_trials or NUM_TRIALS


def sweep_of(config: Config) -> SweepConfig:
    """The sweep section. Raises ConfigError where there is none."""
    if config.sweep is None:
        raise ConfigError("sweep: the config has no such section. See configs/sweep.yaml, or train one run with train.")
    return config.sweep


def mode_of(sweep: SweepConfig) -> str:
    """Whether less or more of the metric is better."""
    return "max" if sweep.metric in (*OF_PAIRS, "exact_match_adapter") else "min"


def check_keys(sweep: SweepConfig) -> None:
    """Refuse parameters that a trial cannot have, or a trial of pbt cannot change. Raises ConfigError."""
    for key in sweep.parameters:
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in NOT_TO_VARY):
            raise ConfigError(f"sweep.parameters.{key}: must be the same in all trials. Set it outside of sweep.")
        if sweep.scheduler == "pbt" and key not in PERTURBABLE:
            raise ConfigError(
                f"sweep.parameters.{key}: sweep.scheduler=pbt goes on from another trial's weights, which {key} would "
                f"not fit. It may change {', '.join(PERTURBABLE)}. Use asha to search {key}."
            )


def draw(parameter: Parameter, chance: random.Random) -> Any:
    """One value."""
    if parameter.kind in ("choice", "grid"):
        return chance.choice(parameter.values)
    low, high = parameter.values
    if parameter.kind == "randint":
        return chance.randint(low, high)
    if parameter.kind == "uniform":
        return chance.uniform(low, high)
    return math.exp(chance.uniform(math.log(low), math.log(high)))


def corners(sweep: SweepConfig) -> list[dict[str, Any]]:
    """Each value of a choice and both ends of each range once, the other parameters at their first."""
    return [point for key in sweep.parameters for point in varied(sweep, key)]


def varied(sweep: SweepConfig, key: str) -> list[dict[str, Any]]:
    """A point for each listed value, or end of the range, of one parameter."""
    first = {name: one.values[0] for name, one in sweep.parameters.items()}
    return [{**first, key: value} for value in sweep.parameters[key].values]


def config_of(config: Config, parameters: dict[str, Any]) -> Config:
    """The config of a trial: the base with its parameters, and no sweep. Raises ConfigError."""
    values = as_written(config)
    del values["sweep"]
    for key, value in parameters.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"sweep.parameters.{key}: {section} is a value, not a section.")
        place[name] = value
    try:
        return make_config(values)
    except ConfigError as error:
        shown = ", ".join(f"{key}={value}" for key, value in parameters.items())
        raise ConfigError(f"sweep.parameters ({shown}): {error}") from None


def as_meant(config: Config, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters as the config reads them: YAML takes 2e-4 for a text. Raises ConfigError."""
    values = config_of(config, parameters).model_dump(mode="json")
    return {key: value_at(values, key) for key in parameters}


def value_at(values: dict[str, Any], key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        values = values[part]
    return values
