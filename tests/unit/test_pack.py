"""Packing by counts is best-fit decreasing, sample by sample, whatever the lengths."""

import bisect
import collections

import numpy as np
import pytest

from qlora_ray.data.pack import pack, pack_in_order


def room_left_by_hand(lengths: list[int], max_length: int) -> list[int]:
    """Best-fit decreasing written out: the longest sample first, each into the fullest row that has room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else max_length
        bisect.insort(rooms, room - length)
    return rooms


def random_lengths(case: int) -> tuple[np.ndarray, int]:
    random = np.random.default_rng(case)
    max_length = int(random.integers(1, 200))
    lengths = random.lognormal(random.uniform(0, 5), 1, int(random.integers(0, 400))).astype(int)
    return np.clip(lengths, 1, max_length), max_length


@pytest.mark.parametrize("case", range(60))
def test_rows_are_filled_as_best_fit_decreasing_fills_them(case):
    lengths, max_length = random_lengths(case)
    offsets, samples = pack(lengths, max_length, seed=case)
    assert sorted(samples) == list(range(len(lengths)))
    room = [max_length - lengths[samples[a:b]].sum() for a, b in zip(offsets, offsets[1:], strict=False)]
    assert sorted(room) == room_left_by_hand(lengths.tolist(), max_length)
    assert all(np.diff(offsets) > 0)


@pytest.mark.parametrize("case", range(60))
def test_rows_filled_in_order_hold_the_next_samples_up_to_the_first_without_room(case):
    lengths, max_length = random_lengths(case)
    offsets = pack_in_order(lengths, max_length)
    assert offsets[0] == 0 and offsets[-1] == len(lengths) and all(np.diff(offsets) > 0)
    for start, end in zip(offsets, offsets[1:], strict=False):
        assert lengths[start:end].sum() <= max_length
        assert end == len(lengths) or lengths[start : end + 1].sum() > max_length


def test_seed_alone_decides_which_samples_of_a_length_meet():
    lengths = np.array([3, 2, 1] * 40)
    same, again, other = (pack(lengths, 6, seed)[1].tolist() for seed in (1, 1, 2))
    assert same == again != other
    first_of_row = collections.Counter(lengths[other[i]] for i in pack(lengths, 6, 2)[0][:-1])
    assert set(first_of_row) <= {3, 2, 1}


@pytest.mark.parametrize("max_length", [512, 2048, 8192])
def test_long_tailed_lengths_fill_more_than_98_percent(max_length):
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 1.0, 20_000).astype(int), 8, max_length)
    offsets, _ = pack(lengths, max_length, seed=0)
    assert lengths.sum() / ((len(offsets) - 1) * max_length) > 0.98
