"""Which rows make which micro-batch: a pure function of (seed, epoch, step), whoever computes it."""

# N rows, B rows in a micro-batch, M micro-batches in a global batch
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NO_ROW = -1  # fills the last global batch of an epoch: micro-batches never change size, rows never repeat


@dataclass(frozen=True)
class Order:
    """Cuts the rows, by permutation(seed, epoch) or as they stand, into global batches of M micro-batches of B."""

    num_rows: int
    seed: int
    micro_batch_size: int
    micro_batches_per_step: int
    is_shuffled: bool = True  # data.order=shuffled; else the rows lie in the order asked for, in every epoch

    @property
    def global_batch_size(self) -> int:
        """Rows that one optimizer step reads."""
        return self.micro_batch_size * self.micro_batches_per_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that read each row once; the last may be short of rows."""
        return -(-self.num_rows // self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """Epoch (from 0) in which optimizer step `step` (from 0) falls."""
        return step // self.steps_per_epoch

    def rows_of_step(self, step: int) -> np.ndarray:
        """Row numbers of optimizer step `step` (from 0): (M, B) int64, NO_ROW where an epoch has run out."""
        epoch = self.epoch_of(step)
        order = permutation(self.num_rows, self.seed, epoch) if self.is_shuffled else np.arange(self.num_rows)
        first = step % self.steps_per_epoch * self.global_batch_size
        rows = np.full(self.global_batch_size, NO_ROW, dtype=np.int64)
        taken = order[first : first + self.global_batch_size]
        rows[: len(taken)] = taken
        # Dealt out like cards, so that a short last batch is short everywhere and no worker idles.
        return rows.reshape(self.micro_batch_size, self.micro_batches_per_step).T

    def rows_of_micro_batch(self, step: int, micro_batch: int) -> np.ndarray:
        """Row numbers of one micro-batch: (B,) int64."""
        return self.rows_of_step(step)[micro_batch]


@lru_cache(maxsize=4)
def permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Row numbers 0..N-1 in the order of one epoch: (N,) int64."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)
    order.setflags(write=False)
    return order


def longest_first(lengths: np.ndarray, seed: int) -> np.ndarray:
    """Where the longest stands in `lengths`, then the next: (N,) int64. Those of one length come as the seed says."""
    shuffled = np.random.Generator(np.random.Philox(key=[seed, 2**63 + 1])).permutation(len(lengths))
    return shuffled[np.argsort(-lengths[shuffled], kind="stable")]


def held_out(num_rows: int, fraction: float, seed: int) -> np.ndarray:
    """Sorted row numbers of the validation split: (round(N x fraction),) int64, at least one where fraction > 0."""
    count = max(1, round(num_rows * fraction)) if fraction > 0 else 0
    shuffled = np.random.Generator(np.random.Philox(key=[seed, 2**63])).permutation(num_rows)
    return np.sort(shuffled[:count])


def micro_batches_of(rank: int, num_workers: int, micro_batches_per_step: int) -> range:
    """Micro-batches of a step that a worker computes: every num_workers-th, so that all stay in step."""
    return range(rank, micro_batches_per_step, num_workers)
