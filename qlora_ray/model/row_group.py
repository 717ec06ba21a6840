"""Rows that workers hold in parts: each has some tokens of all heads, and attends with some heads to all tokens.

DeepSpeed-Ulysses, arXiv:2309.14509: one all-to-all before attention, and one behind it.
"""

# N workers of a group, B rows, T tokens of a whole row, S = T / N of a worker, H heads of E values, F heads of keys
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Heads = tuple[torch.Tensor, ...]  # queries, keys, values


@dataclass(frozen=True)
class RowGroup:
    """The workers that hold rows together, as seen by one of them: it has the `rank`-th part of each row."""

    rank: int
    size: int
    group: Any  # of torch.distributed

    def to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Heads:
        """q (B, H, S, E), k and v (B, F, S, E) -> (B, H / N, T, E) and (B, F' / N, T, E): whole rows of some heads.

        F' is F, or its multiple that N divides: then a head of keys goes to several workers. Every worker of the group
        must call this.
        """
        copies = self.copies(k.shape[1])
        k, v = (part.repeat_interleave(copies, 1) if copies > 1 else part for part in (k, v))
        parts = [self._by_worker(part) for part in (q, k, v)]
        whole = self._exchange(torch.cat(parts, 3)).transpose(0, 1).flatten(1, 2)  # (B, T, heads, E)
        return whole.transpose(1, 2).split([part.shape[3] for part in parts], 1)

    def to_heads_alone(self, q: torch.Tensor) -> torch.Tensor:
        """The same of one tensor with as many heads as queries have."""
        return self._exchange(self._by_worker(q)).transpose(0, 1).flatten(1, 2).transpose(1, 2)

    def to_tokens(self, output: torch.Tensor) -> torch.Tensor:
        """(B, H / N, T, E) -> (B, H, S, E), the inverse of `to_heads_alone`."""
        return self._own_tokens(output.transpose(1, 2)).transpose(1, 2)

    def to_tokens_of_all(self, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, num_keys: int) -> Heads:
        """Gradients of what `to_heads` returned -> those of what it was given: F = num_keys heads of keys."""
        counts, copies = [part.shape[1] for part in (dq, dk, dv)], self.copies(num_keys)
        own = self._own_tokens(torch.cat([part.transpose(1, 2) for part in (dq, dk, dv)], 2))  # (B, S, N x heads, E)
        by_worker = own.unflatten(2, (self.size, sum(counts)))
        q, k, v = (part.flatten(2, 3) for part in by_worker.split(counts, 3))
        k, v = (part.unflatten(2, (num_keys, copies)).sum(3) if copies > 1 else part for part in (k, v))
        return tuple(part.transpose(1, 2) for part in (q, k, v))

    def copies(self, num_keys: int) -> int:
        """Workers that get each head of keys."""
        return math.lcm(num_keys, self.size) // num_keys

    def _by_worker(self, part: torch.Tensor) -> torch.Tensor:
        """(B, H, S, E) -> (N, B, S, H / N, E)."""
        return part.transpose(1, 2).unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4)

    def _own_tokens(self, whole: torch.Tensor) -> torch.Tensor:
        """(B, T, heads, E) -> (B, S, N x heads, E), the heads of the first worker first."""
        sent = whole.unflatten(1, (self.size, -1)).transpose(0, 1)  # (N, B, S, heads, E)
        return self._exchange(sent).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchange(self, sent: torch.Tensor) -> torch.Tensor:
        """The i-th of N parts to the i-th worker."""
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received


class Holders:
    """Who holds the rows of the next forward pass; one for all layers of a model."""

    row_group: RowGroup | None = None  # None: this worker holds them whole
    numbers: torch.Tensor | None = None  # of this worker's tokens, counted through whole rows: (B S,) int32

    @contextmanager
    def are(self, row_group: RowGroup, numbers: torch.Tensor) -> Iterator[None]:
        """Within, forward passes read parts of rows, as this group holds them; numbers (B, S)."""
        self.row_group, self.numbers = row_group, numbers.flatten()
        try:
            yield
        finally:
            self.row_group = self.numbers = None


def make_row_group(rank: int, num_workers: int, size: int) -> RowGroup | None:
    """The group of a worker: `size` neighbours in rank. None where rows are whole. Every worker must call this."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, num_workers, size)]
    return RowGroup(rank % size, size, groups[rank // size])
