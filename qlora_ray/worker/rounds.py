"""Batches of a split dealt out to the workers, round by round: who computes one changes nothing of it."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from qlora_ray.data.rows import Rows
from qlora_ray.worker.seat import Seat


def num_rounds(rows: Rows, batch_size: int, seat: Seat) -> int:
    """Rounds in which the groups of workers have computed all batches."""
    return -(-_num_batches(rows, batch_size) // seat.num_groups)


def rounds(rows: Rows, batch_size: int, seat: Seat) -> Iterator[tuple[pa.Table, bool]]:
    """The batch of a worker's group of each round, and whether it counts. All workers have as many rounds.

    One without a batch left computes the last one all the same: ZeRO-3's forward is a collective.
    """
    last = _num_batches(rows, batch_size) - 1
    for number in range(num_rounds(rows, batch_size, seat)):
        mine = number * seat.num_groups + seat.group
        first = min(mine, last) * batch_size
        yield rows.gather(np.arange(first, min(first + batch_size, len(rows)))), mine <= last


def _num_batches(rows: Rows, batch_size: int) -> int:
    return -(-len(rows) // batch_size)
