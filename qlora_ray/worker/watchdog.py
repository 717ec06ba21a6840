"""Ends a worker that is stuck: each phase has a deadline, and when it passes every thread's stack is in the log."""

import contextlib
import faulthandler
import os
import time
from collections.abc import Iterator

from qlora_ray.config import WatchdogConfig

STEPS_TO_LEARN_FROM = 3
LEARNED_FACTOR = 10  # a deadline is this many times the slowest seen


class Watchdog:
    """One deadline at a time, kept by faulthandler's C thread: it fires though the interpreter lock is held.

    The process ends with os._exit(1), which Ray Train sees at once. Workers pass the phases in step, so that all write
    their stacks before the first of them ends the group.
    """

    def __init__(self, config: WatchdogConfig, log_folder: str | None, rank: int):
        """Stacks go to <log_folder>/stacks_<rank>.log, or without a local folder to stderr."""
        self._config = config
        self._durations: dict[str, list[float]] = {}
        path = f"{log_folder}/{stacks_file(rank)}" if log_folder else None
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.fdopen(os.open(path, flags, 0o600), "a") if path else os.fdopen(os.dup(2), "a")

    @contextlib.contextmanager
    def phase(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """Guard what follows for `seconds`, by default as long as `deadline` says."""
        began = time.perf_counter()
        faulthandler.dump_traceback_later(seconds or self.deadline(name), exit=True, file=self._file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._durations.setdefault(name, []).append(time.perf_counter() - began)
        del self._durations[name][:-100]

    def longest(self, name: str) -> float:
        """Seconds of the slowest of a kind seen of late; 0 before the first."""
        return max(self._durations.get(name, [0.0]))

    def deadline(self, name: str) -> float:
        """Seconds that a phase may take: as configured until three were seen, then ten times the slowest."""
        seen = self._durations.get(name, [])
        if len(seen) < STEPS_TO_LEARN_FROM:
            return getattr(self._config, f"{name}_seconds")
        return max(self._config.min_seconds, LEARNED_FACTOR * max(seen))


def stacks_file(rank: int) -> str:
    """Name of the file, in the folder of logs, that a worker's stacks go to."""
    return f"stacks_{rank}.log"
