"""Ray Data carries the rows that `order` names to one worker, in order, ahead of need. It decides nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_ray.data.cache import open_rows
from qlora_ray.data.order import NO_ROW, Order, micro_batches_of
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.storage import Folder

MICRO_BATCHES_PER_TASK = 64


@dataclass(frozen=True)
class Stream:
    """The micro-batches of one worker from step `first_step` to before `last_step`."""

    entry: Folder
    order: Order
    rank: int
    num_workers: int
    first_step: int
    last_step: int

    def place(self, position: int) -> tuple[int, int]:
        """(step, micro-batch) of the position-th micro-batch of this stream."""
        mine = micro_batches_of(self.rank, self.num_workers, self.order.micro_batches_per_step)
        return self.first_step + position // len(mine), mine[position % len(mine)]

    @property
    def num_micro_batches(self) -> int:
        mine = micro_batches_of(self.rank, self.num_workers, self.order.micro_batches_per_step)
        return (self.last_step - self.first_step) * len(mine)


def deliver(stream: Stream) -> Iterator[pa.Table]:
    """Yield one table of B rows (columns step, micro_batch, input_ids, labels) per micro-batch of the stream."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    count = stream.num_micro_batches
    if count == 0:
        return
    num_tasks = max(1, count // MICRO_BATCHES_PER_TASK)
    positions = ray.data.range(count, override_num_blocks=num_tasks)
    task: Any = rows_at
    rows = positions.map_batches(task, fn_args=(stream,), batch_size=None, batch_format="numpy", num_cpus=0.5)
    yield from rows.iter_batches(
        batch_size=stream.order.micro_batch_size, batch_format="pyarrow", prefetch_batches=2, drop_last=False
    )


def rows_at(batch: dict[str, np.ndarray], stream: Stream) -> pa.Table:
    """Rows of the micro-batches at the given stream positions, B after B."""
    table = open_rows(stream.entry, "train")
    places = [stream.place(int(position)) for position in batch["id"]]
    numbers = [stream.order.rows_of_micro_batch(step, micro) for step, micro in places]
    taken = np.concatenate(numbers)
    columns = table.take(pa.array(np.where(taken == NO_ROW, 0, taken)))
    labels = columns["labels"].combine_chunks()
    if (taken == NO_ROW).any():  # a filler row is read but never trained on
        lengths = np.diff(labels.offsets.to_numpy())
        values = np.where(np.repeat(taken == NO_ROW, lengths), IGNORE_INDEX, labels.values.to_numpy())
        labels = pa.ListArray.from_arrays(labels.offsets, pa.array(values.astype(np.int32)))
    size = stream.order.micro_batch_size
    return pa.table(
        {
            "step": np.repeat([step for step, _ in places], size),
            "micro_batch": np.repeat([micro for _, micro in places], size),
            "input_ids": columns["input_ids"].combine_chunks(),
            "labels": labels,
        }
    )
