"""The micro-batches of one worker, step by step, each fetched while the model still loads or computes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import torch

from qlora_ray.data.delivery import Stream, deliver
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.preference import Preference
from qlora_ray.worker.seat import Seat

DATA_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass reads."""

    tensors: dict[str, torch.Tensor]  # of worker/batches.py
    num_present: int  # workers, from rank 0 on, whose gradient counts in this round
    counts: bool  # whether this worker's does
    preference: Preference | None = None  # what is asked of its pairs, where it holds pairs


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
        seat = self._seat
        for first in range(0, self._num_of_step, seat.num_groups):
            groups_present = min(seat.num_groups, self._num_of_step - first)
            counts = seat.group < groups_present
            if counts:
                number, rows = self._tables.next(step)
                tensors = to_tensors(rows, self._pad_token_id, self._device, seat)
            # Else the last one again, which then does not count: ZeRO-3's forward is a collective.
            seed_everything(self._seed, step, number)
            yield MicroBatch(tensors, groups_present * seat.num_parts, counts, preference)


def seed_everything(seed: int, step: int, micro_batch: int) -> None:
    """Make dropout and noise of a micro-batch a function of its place alone, whoever computes it."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + micro_batch)
