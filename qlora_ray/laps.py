"""Where the time of a start goes: seconds of this process, by part. Parts in threads of their own overlap."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_seconds: dict[str, float] = {}
_began = 0.0


def begin() -> None:
    """Forget the parts of a start before."""
    global _began
    _began = time.time()
    _seconds.clear()


def began() -> float:
    """The time.time() of this start, which other processes of the machine know as well."""
    return _began


@contextmanager
def part(name: str) -> Iterator[None]:
    """What happens within belongs to this part."""
    began = time.perf_counter()
    try:
        yield
    finally:
        note(name, time.perf_counter() - began)


def note(name: str, seconds: float) -> None:
    """Add to a part."""
    _seconds[name] = _seconds.get(name, 0.0) + seconds


def taken() -> dict[str, float]:
    """Seconds by part, in the order in which the parts ended."""
    return {name: round(seconds, 2) for name, seconds in _seconds.items()}
