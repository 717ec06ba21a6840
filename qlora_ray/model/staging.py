"""Values that lie in files, brought to a device: to a GPU through locked buffers, which several threads fill at a time.

One thread copies out of the system's cache of files at a few GB/s, and a GPU takes in fifty.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from qlora_ray.model.pieces import Pieces, Stretch
from qlora_ray.model.pinned import host_memory, lock
from qlora_ray.model.tensors import BYTES, DTYPES, read_into

BUFFER, NUM_BUFFERS = 2**25, 3  # bytes of each
BLOCK, NUM_READERS = 2**22, 8  # bytes of one read, and reads at a time


@dataclass
class _Buffer:
    memory: torch.Tensor
    left: Any = None  # when the GPU has copied what was there


class Staging:
    """The way of values to one device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._buffers: deque[_Buffer] = deque()
        if device.type == "cuda":
            self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="staging")
            self._buffers.extend(_Buffer(host_memory(BUFFER)) for _ in range(NUM_BUFFERS))
            for buffer in self._buffers:
                torch.cuda.check_error(lock(buffer.memory))

    def cut(self, value: Pieces, start: int, stop: int) -> torch.Tensor:
        """The values from `start` to `stop` of the flattened tensor, as they are stored. Raises ConfigError."""
        if not self._buffers:
            return value.cut(start, stop).to(self._device)
        size, done = BYTES[value.stored], 0
        out = torch.empty((stop - start) * size, dtype=torch.uint8, device=self._device)
        for parts in _loads(value.between(start, stop), size):
            done += self._pass_on(parts, out[done:])
        return out.view(getattr(torch, DTYPES[value.stored]))

    def finish(self) -> None:
        """Wait until the GPU has all of it: the buffers may go."""
        for buffer in self._buffers:
            if buffer.left is not None:
                buffer.left.synchronize()

    def _pass_on(self, parts: list[tuple[Stretch, int, int]], out: torch.Tensor) -> int:
        """Read them into the next buffer, and launch the copy to the beginning of `out`; returns the bytes."""
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        if buffer.left is not None:
            buffer.left.synchronize()
        places, at = [], 0
        for _, first, last in parts:
            places.append(buffer.memory[at : (at := at + last - first)])
        list(self._readers.map(_read, parts, places))
        out[:at].copy_(buffer.memory[:at], non_blocking=True)
        buffer.left = torch.cuda.current_stream(self._device).record_event()
        return at


def _loads(stretches: tuple[Stretch, ...], size: int) -> Iterator[list[tuple[Stretch, int, int]]]:
    """Parts of stretches, by the bytes of their tensors, as many as a buffer holds at a time."""
    parts: list[tuple[Stretch, int, int]] = []
    left = BUFFER
    for one in stretches:
        first, end = one.start * size, one.stop * size
        while first < end:
            last = min(end, first + min(BLOCK, left))
            parts.append((one, first, last))
            left, first = left - (last - first), last
            if not left:
                yield parts
                parts, left = [], BUFFER
    if parts:
        yield parts


def _read(part: tuple[Stretch, int, int], place: torch.Tensor) -> None:
    stretch, first, _ = part
    read_into(place, stretch.name, stretch.entry, first)
