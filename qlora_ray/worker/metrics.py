"""What happened since the last logged step, added up: tokens, losses, seconds, memory."""

import math
import resource
import time
from typing import Any

import numpy as np
import torch

from qlora_ray.data.order import NO_ROW, Order
from qlora_ray.data.rows import open_rows, sample_digest
from qlora_ray.rundir.metrics import MetricsFile
from qlora_ray.storage import Folder
from qlora_ray.worker.messages import Logged
from qlora_ray.worker.objectives import FIGURES, figures_of_labelled
from qlora_ray.worker.stopwatch import Stopwatch
from qlora_ray.worker.team import Team


class RowCounts:
    """Tokens and samples of each step, from the cached rows: no worker has to ask another."""

    def __init__(self, rows: Folder, order: Order):
        self._order, self._rows = order, open_rows(rows, "train")
        # One more entry, for NO_ROW = -1, which counts nothing.
        self._tokens = np.append(self._rows.num_tokens, 0)
        self._labels = np.append(self._rows.num_label_tokens, 0)
        self._samples = np.append(self._rows.num_samples, 0)

    @property
    def labelled(self) -> bool:
        """Whether rows hold labelled answers, each with another behind its prompt."""
        return self._rows.labelled

    def tokens(self, step: int) -> int:
        """Tokens that optimizer step `step` (from 0) reads, padding not counted."""
        return int(self._tokens[self._order.rows_of_step(step)].sum())

    def label_tokens(self, step: int) -> int:
        """Tokens that optimizer step `step` (from 0) is trained on, over all workers."""
        return int(self._labels[self._order.rows_of_step(step)].sum())

    def pairs(self, step: int) -> int:
        """Pairs of answers, or labelled ones with another each, of optimizer step `step` (from 0)."""
        return self.samples(step) // 2

    def summands(self, step: int) -> int:
        """What the loss of optimizer step `step` (from 0) is the mean over: its pairs, or its unmasked tokens."""
        return self.pairs(step) if self._rows.pairs else self.label_tokens(step)

    def until(self, step: int) -> tuple[int, int]:
        """(tokens, tokens trained on) of the first `step` optimizer steps of the run."""
        epochs, rest = divmod(step, self._order.steps_per_epoch)
        partial = range(epochs * self._order.steps_per_epoch, step)
        rows = np.concatenate([self._order.rows_of_step(one).ravel() for one in partial]) if rest else [NO_ROW]
        tokens, labels = (int(epochs * each.sum() + each[rows].sum()) for each in (self._tokens, self._labels))
        return tokens, labels

    def epochs(self, step: int) -> float:
        """Passes over the rows that the first `step` optimizer steps of the run make."""
        return step / self._order.steps_per_epoch

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
        self.counts = counts
        self._team, self._writer, self._device = team, writer, device
        self._steps: list[int] = []
        self._sums: list[list[torch.Tensor]] = []  # of each step, of each of this worker's micro-batches
        self._began = self._last = time.perf_counter()
        self._last_step = 0
        self.stopwatch = Stopwatch(device)

    def add(self, step: int, sums: list[torch.Tensor]) -> None:
        """Note a finished step (from 1) and the sums of each of this worker's micro-batches (see optimizer_step)."""
        self._steps.append(step - 1)
        self._last_step = step
        self._sums.append(sums)
        self._last = time.perf_counter()

    @property
    def has_steps(self) -> bool:
        """Whether there are steps since the last logged one."""
        return bool(self._steps)

    def write(self, **values: Any) -> None:
        """Add a line of another kind to metrics.jsonl, on rank 0."""
        if self._writer:
            self._writer.write(**values)

    def flush(self) -> None:
        """Make metrics.jsonl current where it lies on an object store."""
        if self._writer:
            self._writer.flush()

    def skip_time(self, phase: str, step: int | None = None) -> None:
        """Do not count the time since the last step: it went into this phase, e.g. "evaluation" or "checkpoint".

        Before the first step of a resumed run `step` says how many were done.
        """
        now = time.perf_counter()
        self.write(step=self._last_step if step is None else step, **{f"{phase}_seconds": round(now - self._last, 4)})
        self._began, self._last = self._began + now - self._last, now
        self.stopwatch.start()

    def log(self, **values: Any) -> dict[str, Any]:
        """Write one line for the steps since the last. Every worker must call this; waits once for the device."""
        means = self._means()
        now = time.perf_counter()
        seconds = now - self._began
        memory = self._team.max(peak_memory_gib(self._device))
        tokens = sum(map(self.counts.tokens, self._steps))
        entry = {
            "step": self._steps[-1] + 1,
            **means,
            **values,
            "step_seconds": seconds / len(self._steps),
            **{f"{phase}_seconds": spent / len(self._steps) for phase, spent in self.stopwatch.take().items()},
            "tokens_per_second": tokens / seconds,
            "samples_per_second": sum(map(self.counts.samples, self._steps)) / seconds,
            "peak_memory_gib": memory,
            "num_workers": self._team.size,
            "num_tokens": tokens,
            "num_label_tokens": sum(map(self.counts.label_tokens, self._steps)),
            "sample_digests": [self.counts.digest(step) for step in self._steps],  # of the steps up to this one
        }
        self.write(**entry)
        self._team.tell(Logged({name: value for name, value in entry.items() if value is not None}))
        self._steps, self._sums, self._began, self._last = [], [], now, now
        return entry

    def _means(self) -> dict[str, float]:
        """The loss, and of pairs FIGURES, of the noted steps, those left out whose loss is not finite; {} if all are.

        fsum rounds once, at the end: a sum does not depend on which worker had which micro-batch.
        """
        values = iter(torch.stack([sums.reshape(-1) for step in self._sums for sums in step]).tolist())
        mine = [[next(values) for _ in step] for step in self._sums]
        by_step = [[sums for part in parts for sums in part] for parts in zip(*self._team.gather(mine), strict=True)]
        finite = [
            (step, parts)
            for step, parts in zip(self._steps, by_step, strict=True)
            if all(math.isfinite(part[0]) for part in parts)
        ]
        number = sum(self.counts.summands(step) for step, _ in finite)
        parts = [part for _, parts in finite for part in parts]
        return means(parts, number, self.counts.labelled) if number else {}


def means(parts: list[list[float]], number: int, labelled: bool = False) -> dict[str, float]:
    """The loss, and figures of preferences, of the sums of some micro-batches over as many tokens, pairs or answers."""
    loss, *figures = (math.fsum(column) for column in zip(*parts, strict=True))
    if labelled:
        return {"loss": loss / number, **figures_of_labelled(figures, number)}
    return {"loss": loss / number, **{name: sum / number for name, sum in zip(FIGURES, figures, strict=False)}}


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this worker has held: allocated on its GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
