"""Where the time of the training steps goes: marks between phases, read once per logged line."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Attributes the time since the last mark to a phase. On a GPU the marks are CUDA events: nothing waits for them.

    What one worker waits for others, in a collective, is in the phase that the collective is in.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._asides: list[tuple[int, str, Any, Any]] = []  # number of marks before it, phase, begin, end
        self.start()

    def start(self) -> None:
        """Begin anew: the time until now belongs to no phase."""
        self._marks.append(("", self._now()))

    def mark(self, phase: str) -> None:
        """The time since the last mark went into this phase."""
        self._marks.append((phase, self._now()))

    @contextlib.contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """The time in here goes into this phase, and not into the one whose mark comes next."""
        before = self._now()
        yield
        self._asides.append((len(self._marks), phase, before, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call. On a GPU waits until the last mark is reached."""
        if self._is_cuda:
            self._marks[-1][1].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                seconds[phase] += self._between(before, after)
        for number, phase, before, after in self._asides:
            if number < len(self._marks) and (around := self._marks[number][0]):  # else between steps
                seconds[phase] += self._between(before, after)
                seconds[around] -= self._between(before, after)
        self._marks, self._asides = self._marks[-1:], []
        return dict(seconds)

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1000 if self._is_cuda else after - before

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
