"""The micro-batches of one worker, step by step, each fetched while the model still loads or computes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import torch

from qlora_ray.data.delivery import Stream, deliver
from qlora_ray.worker.batches import apart, to_tensors
from qlora_ray.worker.preference import Preference
from qlora_ray.worker.seat import Seat

DATA_TIMEOUT_SECONDS = 600
Measure = Callable[[Iterable[tuple[dict[str, torch.Tensor], bool]]], Preference]  # of batches that count or do not


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass reads."""

    tensors: dict[str, torch.Tensor]  # of worker/batches.py
    num_present: int  # workers, from rank 0 on, whose gradient counts in this round
    counts: bool  # whether this worker's does
    preference: Preference | None = None  # what is asked of its pairs or labelled answers, where it holds such


class Tables:
    """The next table of rows, fetched in a thread."""

    def __init__(self, stream: Stream):
        self._tables = deliver(stream)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = self._thread.submit(next, self._tables, None)

    def next(self, step: int) -> tuple[int, pa.Table]:
        """(micro-batch number, rows) of the next micro-batch, which must belong to this step.

        Raises TimeoutError where none has come for DATA_TIMEOUT_SECONDS.
        """
        table = self._next.result(timeout=DATA_TIMEOUT_SECONDS)
        self._next = self._thread.submit(next, self._tables, None)
        assert table is not None and table["step"][0].as_py() == step, "the delivered rows are not those of this step"
        return table["micro_batch"][0].as_py(), table


class MicroBatches:
    """A worker's share of each step, on its device; the stream is that of the worker's group."""

    def __init__(self, stream: Stream, seat: Seat, seed: int, pad_token_id: int, device: torch.device):
        self._seat, self._num_of_step = seat, stream.order.micro_batches_per_step
        self._tables, self._seed, self._pad_token_id, self._device = Tables(stream), seed, pad_token_id, device

    def of_step(self, step: int, preference: Preference | None = None) -> Iterator[MicroBatch]:
        """One round of the workers after the other; dropout and noise are seeded before each."""
        for number, rows, num_present in self._tables_of(step):
            yield self._micro_batch(step, number, rows, (num_present, preference))

    def of_labelled_step(self, step: int, measure: Measure) -> Iterator[MicroBatch]:
        """The same of labelled answers: what is asked of them takes all the step's mismatched ones to be measured."""
        tables = [(number, *apart(rows), num_present) for number, rows, num_present in self._tables_of(step)]
        mismatched = (
            (to_tensors(others, self._pad_token_id, self._device), self._seat.group < num_present)
            for _, _, others, num_present in tables
        )
        preference = measure(mismatched)
        for number, answers, _, num_present in tables:
            yield self._micro_batch(step, number, answers, (num_present, preference))

    def _tables_of(self, step: int) -> Iterator[tuple[int, pa.Table, int]]:
        """(micro-batch number, rows, groups of workers present) of each round of a step."""
        for first in range(0, self._num_of_step, self._seat.num_groups):
            num_present = min(self._seat.num_groups, self._num_of_step - first)
            if self._seat.group < num_present:
                number, rows = self._tables.next(step)
            # Else the last one again, which then does not count: ZeRO-3's forward is a collective.
            yield number, rows, num_present

    def _micro_batch(
        self, step: int, number: int, rows: pa.Table, how: tuple[int, Preference | None]
    ) -> MicroBatch:  # fmt: skip
        num_present, preference = how
        tensors = to_tensors(rows, self._pad_token_id, self._device, self._seat)
        seed_everything(self._seed, step, number)
        counts = self._seat.group < num_present
        return MicroBatch(tensors, num_present * self._seat.num_parts, counts, preference)


def seed_everything(seed: int, step: int, micro_batch: int) -> None:
    """Make dropout and noise of a micro-batch a function of its place alone, whoever computes it."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + micro_batch)
