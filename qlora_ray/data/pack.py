"""Which samples share a row: best-fit decreasing on counts of lengths, whose cost does not grow with their number.

Where the samples' order is to stay, rows are filled one after the other.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Bin:
    """Bins that hold the same lengths: `count` times `length`, and what `inside` holds."""

    length: int
    count: int
    inside: "_Bin | None"


def pack(lengths: np.ndarray, max_length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Put samples, (N,) lengths from 1 to max_length, into rows of at most max_length tokens.

    Returns (offsets (R+1,) int64, samples (N,) int64): row r holds samples[offsets[r]:offsets[r+1]]. Which of the
    samples of a length goes where is drawn with the seed.
    """
    histogram = np.bincount(lengths, minlength=max_length + 1)
    assert len(histogram) == max_length + 1 and not histogram[0], "a sample is empty or longer than max_length"
    shuffled = np.random.Generator(np.random.Philox(key=[seed, 2**63 + 1])).permutation(len(lengths))
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    next_of = np.cumsum(histogram) - histogram  # by length: where in by_length its next sample stands
    sizes: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    for kind, number in _fill(histogram, max_length):
        columns: list[np.ndarray] = []
        at: _Bin | None = kind
        while at is not None:
            taken = by_length[next_of[at.length] : next_of[at.length] + number * at.count]
            next_of[at.length] += number * at.count
            columns.append(taken.reshape(number, at.count))
            at = at.inside
        rows = np.concatenate(columns, axis=1)  # (number, samples of a row)
        sizes.append(np.full(number, rows.shape[1]))
        samples.append(rows.ravel())
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]) if sizes else np.zeros(1)
    return offsets.astype(np.int64), np.concatenate(samples).astype(np.int64) if samples else np.zeros(0, np.int64)


def pack_in_order(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Fill rows with samples, (N,) lengths, as they come: offsets (R+1,) int64 of each row's first sample."""
    ends = np.cumsum(lengths, dtype=np.int64)
    offsets = [0]
    while offsets[-1] < len(lengths):
        before = ends[offsets[-1] - 1] if offsets[-1] else 0
        offsets.append(int(np.searchsorted(ends, before + max_length, side="right")))
    return np.array(offsets, np.int64)


def _fill(histogram: np.ndarray, max_length: int) -> list[tuple[_Bin, int]]:
    """Kinds of bins and how many there are of each: the longest first, each into the fullest bin that has room.

    Bins with the same room are interchangeable. A bin that takes one sample of a length is then the fullest with room
    for another of it, so it takes as many as fit before the next bin takes one.
    """
    bins: dict[int, list[tuple[_Bin, int]]] = defaultdict(list)  # by room left
    for length in range(max_length, 0, -1):
        left = int(histogram[length])
        for room in sorted(room for room in bins if room >= length):
            fits, kinds = room // length, bins.pop(room)
            while kinds and left:
                kind, number = kinds.pop()
                whole = min(number, left // fits)
                rest = 0 if whole == number else left - whole * fits
                rest = min(rest, fits - 1)
                if number > whole + bool(rest):
                    kinds.append((kind, number - whole - bool(rest)))
                if whole:
                    bins[room - fits * length].append((_Bin(length, fits, kind), whole))
                if rest:
                    bins[room - rest * length].append((_Bin(length, rest, kind), 1))
                left -= whole * fits + rest
            if kinds:
                bins[room].extend(kinds)
            if not left:
                break
        fits = max_length // length
        if left >= fits:
            bins[max_length - fits * length].append((_Bin(length, fits, None), left // fits))
        if left % fits:
            bins[max_length - left % fits * length].append((_Bin(length, left % fits, None), 1))
    return [filled for kinds in bins.values() for filled in kinds]
