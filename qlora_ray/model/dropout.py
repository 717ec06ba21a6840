"""Dropout as a function of its place alone: drawn in forward, and drawn again in backward.

The mask of what a LoRA reads, or of what a base's layer adds, depends on the seed of the micro-batch
(worker/micro_batches.py sets it from the run's seed, the step and the micro-batch), the layer, the group, the row and
the column, and on nothing else: no number of workers, resume, recomputation or kernel changes it. Where workers share
rows of tokens, a row is counted through all of them. Bits come from a hash and no generator, so that a kernel makes
them where it needs them: PCG-RXS-M-XS-32 (O'Neill 2014, HMC-CS-2014-0905; as a hash in Jarzynski and Olano 2020, JCGT
9:3). Dropout of attention is torch's own, from its generator: where attention is computed again, the generator goes
back to where it stood.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

STEPS_OF_PROBABILITY = 2**16  # a value is kept or dropped by 16 bits
MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Drop:
    """With which probability values are dropped, and which mask says so."""

    probability: float
    place: int = 0  # layer and group
    word: int = 0  # of the micro-batch's seed, 32 bits
    numbers: torch.Tensor | None = field(default=None, compare=False)  # of the rows, int32; None: as they lie
    held: torch.Tensor | None = field(default=None, compare=False)  # (1,) int32 to read the word from; None: `word`

    @property
    def key(self) -> int:
        """Of the mask, 32 bits; kernels make the same."""
        return pcg(self.word ^ self.place & MASK_32)

    def word_on(self, device: torch.device) -> torch.Tensor:
        """The word where a kernel reads it: (1,) int32."""
        return word_on(self.word, device) if self.held is None else self.held

    @property
    def threshold(self) -> int:
        """Values whose 16 bits are below it are dropped."""
        return round(self.probability * STEPS_OF_PROBABILITY)

    @property
    def scale(self) -> float:
        """Of the values that are kept, so that their mean stays."""
        return 1 / (1 - self.probability)

    def of_rows(self, rows: slice, device: torch.device) -> "Drop":
        """The same mask for a slice of the rows."""
        if not self.probability:
            return self
        if self.numbers is not None:
            return replace(self, numbers=self.numbers[rows])
        return replace(self, numbers=torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device))


NOTHING = Drop(0.0)


def drop_of(probability: float, seed: int, place: int, numbers: torch.Tensor | None = None) -> Drop:
    """The mask of one place (layer and group) in a micro-batch of this seed."""
    return Drop(probability, place, word_of(seed), numbers, _held.get()) if probability else NOTHING


def word_of(seed: int) -> int:
    """What masks take of a micro-batch's seed: 32 bits."""
    return pcg(pcg(seed & MASK_32) ^ (seed >> 32 & MASK_32))


@lru_cache(4)
def word_on(word: int, device: torch.device) -> torch.Tensor:
    """32 bits on a device: (1,) int32."""
    return torch.full((1,), word - 2**32 * (word >= 2**31), dtype=torch.int32, device=device)


_held: ContextVar[torch.Tensor | None] = ContextVar("held", default=None)


@contextmanager
def reading(held: torch.Tensor) -> Iterator[None]:
    """Within, masks follow what this (1,) int32 holds whenever their kernels run, and no seed."""
    token = _held.set(held)
    try:
        yield
    finally:
        _held.reset(token)


def probability_of(lora: Any) -> float:
    """The dropout of one of PEFT's LoRA layers as it is now: 0 in evaluation mode, and without a LoRA."""
    return probability_in(next(iter(lora.lora_dropout.values())) if lora is not None else None)


def probability_in(module: torch.nn.Module | None) -> float:
    """Of a module of dropout as it is now; 0 of another module, and without one."""
    return float(module.p) if isinstance(module, torch.nn.Dropout) and module.training else 0.0


def generator_state(device: torch.device) -> torch.Tensor:
    """Where torch's generator of a device stands."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def drawing_from(state: torch.Tensor | None, device: torch.device) -> Iterator[None]:
    """Within, the generator of a device draws from this state on; None: from where it stands."""
    if state is None:
        yield
        return
    set_state = (lambda one: torch.cuda.set_rng_state(one, device)) if device.type == "cuda" else torch.set_rng_state
    before = generator_state(device)
    set_state(state)
    try:
        yield
    finally:
        set_state(before)


def pcg(value: int) -> int:
    """A hash of 32 bits to 32 bits."""
    state = (value * 747796405 + 2891336453) & MASK_32
    word = ((state >> ((state >> 28) + 4)) ^ state) * 277803737 & MASK_32
    return (word >> 22) ^ word


def kept(rows: int, columns: int, drop: Drop, device: torch.device) -> torch.Tensor:
    """Which values of (rows, columns) are kept: bool. A word of the hash decides on two neighbours in a row."""
    numbers = np.arange(rows) if drop.numbers is None else drop.numbers.cpu().numpy()
    row = _pcg(numbers.astype(np.uint32) ^ np.uint32(drop.key))
    column = _pcg(np.arange(-(-columns // 2), dtype=np.uint32) ^ np.uint32(~drop.key & MASK_32))
    words = _pcg(row[:, None] ^ column[None, :])  # (rows, columns / 2)
    bits = words.astype("<u4", copy=False).view("<u2")  # the low half of a word first
    return torch.from_numpy(bits[:, :columns] >= drop.threshold).to(device)


def _pcg(value: np.ndarray) -> np.ndarray:
    value *= np.uint32(747796405)  # uint32 keeps a product's low 32 bits; in place, for the whole mask is a lot
    value += np.uint32(2891336453)
    word = value >> np.uint32(28)
    word += np.uint32(4)
    np.right_shift(value, word, out=word)
    word ^= value
    word *= np.uint32(277803737)
    np.right_shift(word, np.uint32(22), out=value)
    word ^= value
    return word
