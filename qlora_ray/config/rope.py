"""What model.rope_scaling may say: RoPE for longer rows, by the names of transformers' `rope_parameters`."""

import math
from typing import Any

# By type: numbers that it needs, and those that it may have.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}  # fmt: skip
PAIRS = (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))  # the first is the smaller one


def checked(scaling: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises ValueError for what transformers would pass over, or take for something else."""
    kind = scaling.get("rope_type")
    if kind not in KINDS:
        raise ValueError(f"rope_type is {kind!r}, and must be {', '.join(KINDS)}, as in {{rope_type: yarn, factor: 4}}")
    needed, known = KINDS[kind]
    if missing := [name for name in needed if name not in scaling]:
        raise ValueError(f"{kind} needs {' and '.join(missing)}")
    if unknown := [name for name in scaling if name not in ("rope_type", *needed, *known)]:
        raise ValueError(f"{kind} has no {unknown[0]}; it has {', '.join((*needed, *known))}")
    for name, value in scaling.items():
        if name != "rope_type" and not _is_good(name, value):
            raise ValueError(f"{name} is {value!r}, and must be {_rule(name)}")
    for low, high in PAIRS:
        if low in scaling and high in scaling and scaling[low] >= scaling[high]:
            raise ValueError(f"{low} is {scaling[low]:g}, and must be less than {high}, {scaling[high]:g}")
    return scaling


def _is_good(name: str, value: Any) -> bool:
    if name == "truncate":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if name == "original_max_position_embeddings":
        return isinstance(value, int) and value > 0
    return value > 1 if name == "factor" else value > 0


def _rule(name: str) -> str:
    if name == "truncate":
        return "true or false"
    if name == "original_max_position_embeddings":
        return "a whole number of tokens"
    return "a number above 1" if name == "factor" else "a number above 0"
