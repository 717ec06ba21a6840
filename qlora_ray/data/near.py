"""Which records say the same, or nearly: equal texts after normalisation, and sets of word sequences that overlap."""

import functools
import hashlib
import importlib.util
import re
import unicodedata
import zlib
from array import array
from typing import Any

import numpy as np

THRESHOLD = 0.85  # of the Jaccard index of two records' sets of five words in a row
WORDS_IN_A_ROW = 5
NUM_PERMUTATIONS = 128
MOST_COMPARED = 500_000  # different records; each takes about 3 KB
# Where no space stands between words each character is one.
UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """The text without what two copies of it differ in: case, spaces, and ways to write a character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def can_be_near() -> bool:
    """Whether datasketch is installed."""
    return importlib.util.find_spec("datasketch") is not None


class Groups:
    """Records that agree, each in the group of the first of them."""

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}
        self._of = array("q")

    def add(self, text: str) -> int:
        """Put the next record into the group of this text; returns the group's first record."""
        first = self._first.setdefault(hashlib.blake2b(text.encode(), digest_size=12).digest(), len(self._of))
        self._of.append(first)
        return first

    def of(self) -> np.ndarray:
        """The first record of each record's group: (N,) int64."""
        return np.array(self._of, np.int64)


class NearGroups:
    """Records that nearly agree, each in the group of the first; found by MinHash with locality-sensitive hashing.

    (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3; as datasketch has them.)
    """

    def __init__(self) -> None:
        import datasketch

        self._make = functools.partial(datasketch.MinHash, NUM_PERMUTATIONS, hashfunc=int)
        self._permutations = self._make().permutations
        self._index = datasketch.MinHashLSH(THRESHOLD, NUM_PERMUTATIONS, hashfunc=_eight_bytes)
        self._sketches: dict[int, Any] = {}
        self._of = array("q")

    def add(self, text: str, first: int) -> int:
        """Put the next record into a group and return the group's first; `first` is the first of the very same."""
        number = len(self._of)
        if first != number:
            self._of.append(self._of[first])
            return self._of[first]
        hashes = shingles(text)
        sketch = self._make(permutations=self._permutations, scheme="affine32")
        sketch.update_batch(hashes)
        found = [key for key in self._index.query(sketch) if sketch.jaccard(self._sketches[key]) >= THRESHOLD]
        self._of.append(min(found, default=number))
        if not found and len(self._sketches) < MOST_COMPARED:
            self._sketches[number] = sketch
            self._index.insert(number, sketch, check_duplication=False)
        return self._of[number]

    @property
    def is_full(self) -> bool:
        """Whether later records are no longer compared with each other."""
        return len(self._sketches) >= MOST_COMPARED

    def of(self) -> np.ndarray:
        """The first record of each record's group: (N,) int64."""
        return np.array(self._of, np.int64)


def shingles(text: str) -> list[int]:
    """Hashes (32 bits) of every five words in a row of a normalised text; of all its words, where there are fewer."""
    words = np.fromiter(map(_hash, WORD.findall(text)), np.uint64)
    length = max(1, min(WORDS_IN_A_ROW, len(words)))
    rows = np.zeros(max(1, len(words) - length + 1), np.uint64)
    for i in range(min(length, len(words))):
        rows = rows * FACTOR + words[i : len(words) - length + 1 + i]
    return np.unique(rows >> np.uint64(32)).tolist()


@functools.lru_cache(maxsize=1 << 17)
def _hash(word: str) -> int:
    return zlib.crc32(word.encode())


def _eight_bytes(band: bytes) -> bytes:
    return hashlib.blake2b(band, digest_size=8).digest()
