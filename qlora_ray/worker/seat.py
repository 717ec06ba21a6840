"""Which rows a worker takes, and which part of each. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Seat:
    """A worker among the groups that each take whole rows, and among the workers of its group."""

    group: int
    num_groups: int
    part: int = 0
    num_parts: int = 1  # training.sequence_parallel


def seat_of(rank: int, num_workers: int, num_parts: int) -> Seat:
    """Neighbours in rank are a group. `num_workers` is a multiple of `num_parts`."""
    assert num_workers % num_parts == 0, f"{num_workers} workers in groups of {num_parts}"
    return Seat(rank // num_parts, num_workers // num_parts, rank % num_parts, num_parts)
