"""metrics.jsonl: a line per logged step or validation, written by one process, continued without gaps on resume."""

import json
import math
import resource
import time
from typing import Any

import numpy as np
import torch

from qlora_ray.data.order import Order
from qlora_ray.data.rows import open_rows, sample_digest
from qlora_ray.storage import DISK_IS_FULL, Folder
from qlora_ray.worker.stopwatch import Stopwatch
from qlora_ray.worker.team import Team


class MetricsFile:
    """Appends lines on a local disk; on object stores, which cannot append, rewrites the file at every flush."""

    def __init__(self, run: Folder, resume_step: int):
        self._target = run / "metrics.jsonl"
        lines = self._target.read_bytes().decode().splitlines() if self._target.exists() else []
        # Steps after the checkpoint are done again, and their lines with them. A torn last line goes too.
        self._lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resume_step]
        self._rewrite()

    def write(self, **values: Any) -> dict[str, Any]:
        """Add one line; None values are left out. Returns what was written. On a full disk the line waits for space."""
        entry = {name: value for name, value in values.items() if value is not None} | {"time": round(time.time(), 3)}
        self._lines.append(json.dumps(entry))
        if self._target.is_local:
            self._append()
        return entry

    def flush(self) -> None:
        """Make the file on an object store current."""
        if not self._target.is_local:
            self._rewrite()

    def _append(self) -> None:
        text = "".join(line + "\n" for line in self._lines).encode()
        with open(self._target.path, "r+b", buffering=0) as file:
            file.seek(self._whole_bytes)  # over what a write that found no space has left
            try:
                file.truncate()
                if file.write(text) != len(text):
                    return
            except OSError as error:
                if error.errno not in DISK_IS_FULL:
                    raise
                return
        self._whole_bytes += len(text)
        self._lines.clear()

    def _rewrite(self) -> None:
        content = "".join(line + "\n" for line in self._lines).encode()
        self._target.write_bytes(content)
        if self._target.is_local:
            self._whole_bytes = len(content)
            self._lines.clear()


class RowCounts:
    """Tokens and samples of each step, from the cached rows: no worker has to ask another."""

    def __init__(self, rows: Folder, order: Order):
        self._order, self._rows = order, open_rows(rows, "train")
        # One more entry, for NO_ROW = -1, which counts nothing.
        self._tokens = np.append(self._rows.num_tokens, 0)
        self._labels = np.append(self._rows.num_label_tokens, 0)
        self._samples = np.append(self._rows.num_samples, 0)

    def tokens(self, step: int) -> int:
        """Tokens that optimizer step `step` (from 0) reads, padding not counted."""
        return int(self._tokens[self._order.rows_of_step(step)].sum())

    def label_tokens(self, step: int) -> int:
        """Tokens that optimizer step `step` (from 0) is trained on, over all workers."""
        return int(self._labels[self._order.rows_of_step(step)].sum())

    def samples(self, step: int) -> int:
        """Samples of optimizer step `step` (from 0); a packed row holds several."""
        return int(self._samples[self._order.rows_of_step(step)].sum())

    def sample_numbers(self, step: int) -> list[int]:
        """The samples that optimizer step `step` (from 0) reads, numbered through the sources."""
        return self._rows.samples_of(self._order.rows_of_step(step).ravel()).tolist()

    def digest(self, step: int) -> str:
        """Digest of the samples of optimizer step `step` (from 0), in the order of the epoch."""
        return sample_digest(self._rows, self._order, step)


class Meter:
    """Adds up what happened since the last logged step. Losses stay on the device until then."""

    def __init__(self, team: Team, counts: RowCounts, writer: MetricsFile | None, device: torch.device):
        self._team, self._counts, self._writer, self._device = team, counts, writer, device
        self._steps: list[int] = []
        self._nats: list[list[torch.Tensor]] = []  # of each step, of each of this worker's micro-batches
        self._began = self._last = time.perf_counter()
        self._last_step = 0
        self.stopwatch = Stopwatch(device)

    def add(self, step: int, nats: list[torch.Tensor]) -> None:
        """Note a finished step (from 1) and the sum of nats of each of this worker's micro-batches."""
        self._steps.append(step - 1)
        self._last_step = step
        self._nats.append(nats)
        self._last = time.perf_counter()

    def skip_time(self, phase: str) -> None:
        """Do not count the time since the last step: it went into this phase, "evaluation" or "checkpoint"."""
        now = time.perf_counter()
        if self._writer:
            self._writer.write(step=self._last_step, **{f"{phase}_seconds": round(now - self._last, 4)})
        self._began, self._last = self._began + now - self._last, now
        self.stopwatch.start()

    def log(self, **values: Any) -> dict[str, Any]:
        """Write one line for the steps since the last. Every worker must call this; waits once for the device."""
        loss = self._loss()
        now = time.perf_counter()
        seconds = now - self._began
        memory = self._team.max(peak_memory_gib(self._device))
        tokens = sum(map(self._counts.tokens, self._steps))
        entry = {
            "step": self._steps[-1] + 1,
            **({} if loss is None else {"loss": loss}),
            **values,
            "step_seconds": seconds / len(self._steps),
            **{f"{phase}_seconds": spent / len(self._steps) for phase, spent in self.stopwatch.take().items()},
            "tokens_per_second": tokens / seconds,
            "samples_per_second": sum(map(self._counts.samples, self._steps)) / seconds,
            "peak_memory_gib": memory,
            "num_workers": self._team.size,
            "num_tokens": tokens,
            "num_label_tokens": sum(map(self._counts.label_tokens, self._steps)),
            "sample_digests": [self._counts.digest(step) for step in self._steps],  # of the steps up to this one
        }
        if self._writer:
            self._writer.write(**entry)
        self._team.tell(kind="logged", **{name: value for name, value in entry.items() if value is not None})
        self._steps, self._nats, self._began, self._last = [], [], now, now
        return entry

    def _loss(self) -> float | None:
        """Nats per unmasked token of the noted steps, those left out whose loss is not finite; None if all are.

        fsum rounds once, at the end: the sum does not depend on which worker had which micro-batch.
        """
        values = iter(torch.stack([nats for step in self._nats for nats in step]).tolist())
        mine = [[next(values) for _ in step] for step in self._nats]
        by_step = [[nats for part in parts for nats in part] for parts in zip(*self._team.gather(mine), strict=True)]
        finite = [
            (step, nats) for step, nats in zip(self._steps, by_step, strict=True) if all(map(math.isfinite, nats))
        ]
        labels = sum(self._counts.label_tokens(step) for step, _ in finite)
        return math.fsum(value for _, nats in finite for value in nats) / labels if labels else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this worker has held: allocated on its GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
