"""Libraries of others: the versions that the tests ran with, and what a patch of one's internals must say. Pure."""

import re
from dataclasses import dataclass

# Oldest and newest: the newest is what constraints.txt pins, the oldest of torch what GPUs were measured with.
TESTED = {
    "torch": ("2.11.0", "2.13.0"),
    "transformers": ("5.23.0", "5.23.0"),
    "peft": ("0.21.2", "0.21.2"),
    "bitsandbytes": ("0.50.2", "0.50.2"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "ray": ("2.60.0", "2.60.0"),
}


@dataclass(frozen=True)
class Patch:
    """One change of a library's internals, or one use of what it promises nobody. A test holds that it has its effect.

    It stands beside the code that does it; `python -m benchmarks.patches` prints all.
    """

    library: str
    read_in: str  # version
    what: str
    gains: str
    delete_when: str


def untested(versions: dict[str, str]) -> list[str]:
    """At most one note, which names the libraries whose installed version no test has seen, with those that were."""
    named = [f"{name} {versions[name]} ({_span(name)})" for name in TESTED if not _is_tested(name, versions[name])]
    return [f"the tests ran with other versions of: {', '.join(named)}. constraints.txt pins them."] if named else []


def _is_tested(name: str, version: str) -> bool:
    oldest, newest = map(_numbers, TESTED[name])
    return oldest <= _numbers(version) <= newest


def _span(name: str) -> str:
    oldest, newest = TESTED[name]
    return oldest if oldest == newest else f"{oldest} to {newest}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0]))
