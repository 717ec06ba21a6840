"""A parameter of ours as Ray Tune's."""

from typing import Any

from ray import tune

from qlora_ray.config import Parameter


def domain(parameter: Parameter) -> Any:
    """The parameter as Ray Tune's domain; PBT goes through a list step by step."""
    if parameter.kind in ("choice", "grid"):
        return parameter.values
    low, high = parameter.values
    made = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
    return made[parameter.kind](low, high + 1 if parameter.kind == "randint" else high)
