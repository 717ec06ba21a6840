"""Bytes that GPUs get from each other over NVLink while a run trains, by the counters of the driver."""

import json
import re
import subprocess
import threading
import time
from pathlib import Path

EVERY = 0.2  # seconds between two looks


class Links:
    """Looks at the counters, and at the steps that a run logs, until the block ends."""

    def __init__(self, run: Path):
        self._metrics = run / "metrics.jsonl"
        self._counted: list[tuple[float, float]] = []  # when, and bytes that all GPUs have received until then
        self._steps: dict[int, float] = {}  # when each logged one was written
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Links":
        if _received() is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident:
            self._thread.join()

    def bytes_a_step(self, num_gpus: int, first: int) -> float | None:
        """Of each GPU, from the writing of step `first` to that of the last one; None without counters."""
        times = [(step, when) for step, when in sorted(self._steps.items()) if step >= first]
        if len(times) < 2 or not self._counted:
            return None
        (began, start), (ended, stop) = times[0], times[-1]
        return (self._at(stop) - self._at(start)) / (ended - began) / num_gpus

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            when = time.time()
            received = _received()
            if received is not None:
                self._counted.append((when, received))
            if self._metrics.exists():
                written = self._metrics.stat().st_mtime
                for line in self._metrics.read_text().splitlines():
                    entry = json.loads(line) if line.endswith("}") else {}
                    if "loss" in entry:
                        self._steps.setdefault(entry["step"], written)

    def _at(self, when: float) -> float:
        """Bytes at a time, between two looks on the line from one to the other."""
        later = next(number for number, (time_of, _) in enumerate(self._counted) if time_of >= when)
        (before, low), (after, high) = self._counted[later - 1], self._counted[later]
        return low + (high - low) * (when - before) / (after - before)


def _received() -> float | None:
    """Bytes that all links of this host have received; None where there are none."""
    try:
        told = subprocess.run(["nvidia-smi", "nvlink", "-gt", "d"], capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        return None
    counts = re.findall(r"Data Rx: (\d+) KiB", told.stdout)
    return 1024 * sum(map(float, counts)) if counts else None
