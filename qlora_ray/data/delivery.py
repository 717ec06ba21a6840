"""Ray Data carries the rows that `order` names to one worker, in order, ahead of need. It decides nothing."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_ray.data.order import Order, micro_batches_of
from qlora_ray.data.rows import open_rows
from qlora_ray.data.spread import quiet_ray_data
from qlora_ray.storage import Folder

MICRO_BATCHES_PER_TASK, TOKENS_PER_TASK = 64, 1 << 22  # 12 bytes each
TASKS_AT_ONCE = 8
MICRO_BATCHES_AHEAD = 8


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
        """Micro-batches that this worker will get from here to the last step."""
        mine = micro_batches_of(self.rank, self.num_workers, self.order.micro_batches_per_step)
        return (self.last_step - self.first_step) * len(mine)


def deliver(stream: Stream) -> Iterator[pa.Table]:
    """Yield one table of B rows (step, micro_batch, and the columns of Rows.gather) per micro-batch of the stream.

    Of pairs 2 B rows. Ray Data needs seconds to its first block: until it has caught up, the same function is called
    here instead. The first MICRO_BATCHES_PER_TASK are never asked of it, so that a short stream does not start it at
    all.
    """
    carried = _Carried(stream)
    try:
        for position in range(stream.num_micro_batches):
            table = carried.take(position)
            yield rows_at({"id": np.array([position])}, stream) if table is None else table
    finally:
        carried.stop()


def rows_at(batch: dict[str, np.ndarray], stream: Stream) -> pa.Table:
    """Rows of the micro-batches at the given stream positions, B after B."""
    places = [stream.place(int(position)) for position in batch["id"]]
    rows = np.concatenate([stream.order.rows_of_micro_batch(step, micro) for step, micro in places])
    held = open_rows(stream.entry, "train")
    table = held.gather(rows)
    for name, column in (("micro_batch", 1), ("step", 0)):
        values = np.repeat([place[column] for place in places], stream.order.micro_batch_size * held.rows_of_tokens)
        table = table.add_column(0, name, pa.array(values))
    return table


class _Carried:
    """The micro-batches that Ray Data has brought, fetched ahead by a thread."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._ready: queue.Queue[tuple[int, pa.Table]] = queue.Queue(MICRO_BATCHES_AHEAD)
        self._wanted, self._is_stopped = 0, False
        self._error: BaseException | None = None
        if stream.num_micro_batches > MICRO_BATCHES_PER_TASK:
            threading.Thread(target=self._fetch, daemon=True, name="ray-data").start()

    def take(self, position: int) -> pa.Table | None:
        """The table of a position, later at each call; None if it is not here yet."""
        if self._error:
            raise self._error
        self._wanted = position
        while not self._ready.empty():  # nobody else takes from it
            if self._ready.queue[0][0] > position:
                return None
            brought, table = self._ready.get()
            if brought == position:
                return table
        return None

    def stop(self) -> None:
        self._is_stopped = True

    def _fetch(self) -> None:
        from ray.exceptions import RayError

        try:
            for position, table in enumerate(_stream_of_ray(self._stream), MICRO_BATCHES_PER_TASK):
                while position >= self._wanted and not self._is_stopped:
                    with contextlib.suppress(queue.Full):
                        self._ready.put((position, table), timeout=1)
                        break
                if self._is_stopped:
                    return
        except RayError as error:
            self._error = error


def _stream_of_ray(stream: Stream) -> Iterator[pa.Table]:
    import ray

    rows = open_rows(stream.entry, "train")
    size, each = stream.order.micro_batch_size * rows.rows_of_tokens, micro_batches_per_task(stream)
    for first in range(MICRO_BATCHES_PER_TASK, stream.num_micro_batches, TASKS_AT_ONCE * each):
        count = min(TASKS_AT_ONCE * each, stream.num_micro_batches - first)
        for block in _made_by_ray(stream, first, count):
            table = ray.get(block)
            yield from (table.slice(start, size) for start in range(0, table.num_rows, size))


def micro_batches_per_task(stream: Stream) -> int:
    """How many one task gathers: fewer of long rows, for they lie in memory together."""
    tokens = stream.order.micro_batch_size * int(open_rows(stream.entry, "train").num_tokens.max())
    return max(1, min(MICRO_BATCHES_PER_TASK, TOKENS_PER_TASK // tokens))


def _made_by_ray(stream: Stream, first: int, count: int) -> list[Any]:
    """Tables in the object store, of the micro-batches from stream position `first` on, in order.

    Made to the end before any is read: while it executes, Ray Data's scheduler turns round and round in a thread of
    this process, and the training thread beside it takes twice its time.
    """
    import ray.data

    quiet_ray_data()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    positions = ray.data.range(count, override_num_blocks=-(-count // micro_batches_per_task(stream)))
    task: Any = _rows_after
    rows = positions.map_batches(
        task, fn_args=(stream, first), batch_size=None, batch_format="numpy", num_cpus=0.5
    ).materialize()
    return rows.to_arrow_refs()


def _rows_after(batch: dict[str, np.ndarray], stream: Stream, first: int) -> pa.Table:
    return rows_at({"id": batch["id"] + first}, stream)
