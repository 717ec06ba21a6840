"""Frozen weights of decoder layers that pass through three slots of the device, brought while it computes.

A layer's weights and their scales are one slab, which comes as one. Forward fetches the next layers, backward those
before; nothing is written back. A layer's slot is always the same, so its parameters are views of it for good, and what
they show is the layer's when `fetch` says so. The last layers may stay on the device.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from qlora_ray.errors import ConfigError
from qlora_ray.model.homes import Away, Home, InMemory, scales_of, values_of
from qlora_ray.model.layer import FusedLayer
from qlora_ray.model.pinned import host_memory, lock
from qlora_ray.model.plain import plain_layers

NUM_SLOTS = 3
BORDER = 256  # bytes: where each tensor of a slab begins
NUM_FILLERS = 8  # threads that put slabs together: one touches new memory at 1 to 2 GB/s
SMALLEST = 2**16  # bytes of a weight that is worth a copy at each turn; packed ones always are


@dataclass
class Slab:
    """What passes of one layer."""

    layer: torch.nn.Module
    parameters: list[Any]
    homes: list[tuple[int, Home]] = field(default_factory=list)  # where each begins in the slab
    places: list[Callable[[torch.Tensor], None]] = field(default_factory=list)  # make a tensor a view of a slab
    num_bytes: int = 0

    def add(self, values: torch.Tensor, shape: torch.Size, home: Home, put: Callable[[torch.Tensor], None]) -> None:
        """A tensor more, of the dtype of `values`."""
        start, stop = self.num_bytes, self.num_bytes + home.num_bytes
        self.homes.append((start, home))
        dtype = values.dtype

        def place(slab: torch.Tensor) -> None:
            put(slab[start:stop].view(dtype).view(shape))

        self.places.append(place)
        self.num_bytes = -(-stop // BORDER) * BORDER

    def show(self, memory: torch.Tensor) -> None:
        """Make the layer's tensors views of this memory."""
        for place in self.places:
            place(memory)

    def read_into(self, out: torch.Tensor) -> None:
        """Put it together in memory of the host."""
        for start, home in self.homes:
            home.read_into(out[start : start + home.num_bytes])


class Homes(Protocol):
    """Who knows where scales are."""

    def homes_of_scales(self, parameter: Any) -> list[Home]:
        """Of a weight; none of one that is not packed."""


def slab_of(layer: torch.nn.Module, keeper: Homes) -> Slab:
    """What of a layer passes: what is packed, with its scales, and other frozen weights that are large."""
    found = [p for module in layer.modules() for p in module.parameters(recurse=False) if hasattr(p, "home")]
    slab = Slab(layer, [p for p in found if hasattr(p, "quant_state") or p.home.num_bytes >= SMALLEST])
    for parameter in slab.parameters:
        slab.add(parameter, parameter.whole_shape, parameter.home, partial(setattr, parameter, "data"))
        scales = scales_of(getattr(parameter, "quant_state", None))
        for one, home in zip(scales, keeper.homes_of_scales(parameter), strict=True):
            shape = torch.Size((home.num_bytes // one.absmax.element_size(),))
            slab.add(one.absmax, shape, home, partial(setattr, one, "absmax"))
    return slab


class Copies(Protocol):
    """Brings slabs to the device."""

    def copy(self, slab: Slab, slot: torch.Tensor, passed: Any) -> Any:
        """Begin to, once the device is past a mark; returns what to wait for."""

    def wait(self, arrival: Any) -> None:
        """Have the device wait for it before what is launched next."""


class Ring:
    """The slabs of a model's layers, first to last."""

    def __init__(self, slabs: list[Slab], device: torch.device, copies: Copies):
        self.slabs, self.device, self._copies = slabs, device, copies
        self.num_resident = 0
        self._resident: list[torch.Tensor] = []
        self._slots = [self._memory(max(slab.num_bytes for slab in slabs)) for _ in range(min(NUM_SLOTS, len(slabs)))]
        self._holds: list[int | None] = [None] * NUM_SLOTS
        self._arrivals: list[Any] = [None] * NUM_SLOTS
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext  # entered while the device waits
        self.ends: Any = None  # model/ends.py, where the model's pass too
        self._index = {id(p): index for index, slab in enumerate(slabs) for p in slab.parameters}
        for index, slab in enumerate(slabs):
            slab.show(self._slots[index % NUM_SLOTS])
            self._fetch_where_needed(index, slab.layer)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Whose weights pass."""
        return [*(slab.layer for slab in self.slabs), *(self.ends.modules if self.ends else ())]

    @property
    def num_passing(self) -> int:
        """Layers that pass through the slots."""
        return len(self.slabs) - self.num_resident

    def fetch(self, index: int, step: int) -> None:
        """Have a layer there for what is launched next, and the two after it in a direction, 1 or -1, on their way."""
        if index >= self.num_passing:
            return
        passed = mark(self.device)
        for number in (index, index + step, index + 2 * step):
            slot = number % NUM_SLOTS
            if 0 <= number < self.num_passing and self._holds[slot] != number:
                self._holds[slot] = number
                self._arrivals[slot] = self._copies.copy(self.slabs[number], self._slots[slot], passed)
        with self.waiting():
            self._copies.wait(self._arrivals[index % NUM_SLOTS])

    def bring(self, parameter: torch.Tensor) -> None:
        """Have a parameter's values there, if it is of a layer that passes."""
        index = self._index.get(id(parameter))
        if index is not None:
            self.fetch(index, 0)
        elif self.ends:
            self.ends.bring(parameter)

    def keep_last(self, count: int) -> None:
        """Keep so many of the last layers on the device from now on."""
        self.num_resident = count
        for slab in self.slabs[self.num_passing :]:
            memory = self._memory(slab.num_bytes)
            self._copies.wait(self._copies.copy(slab, memory, mark(self.device)))
            self._resident.append(memory)
            slab.show(memory)
        if not self.num_passing:
            for arrival in filter(None, self._arrivals):
                self._copies.wait(arrival)  # else it would arrive in memory that others have by then
            self._slots = []

    def _memory(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _fetch_where_needed(self, index: int, layer: torch.nn.Module) -> None:
        layer.register_forward_pre_hook(lambda *_: self.fetch(index, 1))
        if is_fused_layer(layer):
            layer.__dict__["fused"].before_backward = partial(self.fetch, index, -1)
        else:  # backward computes it again: the pass with gradients is that one
            layer.bring_weights = lambda: self.fetch(index, -1 if torch.is_grad_enabled() else 1)  # type: ignore


def mark(device: torch.device) -> Any:
    """Where a device's stream is now; None of a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class FromMemory:
    """Slabs in host memory, each a mapping of its own that the device copies from; on a CPU the same at once."""

    def __init__(self, slabs: list[Slab], device: torch.device):
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: dict[int, torch.Tensor] = {}
        with ThreadPoolExecutor(NUM_FILLERS) as fillers, ThreadPoolExecutor(1) as locker:
            codes = []
            for slab in slabs:  # one by one, so that no more than one lies here twice
                place = self._places[id(slab)] = self._take(slab, fillers)
                codes += [locker.submit(_lock, place, device)] if self._stream else []
            for code in codes:
                _check_lock(code.result(), "cpu", sum(place.numel() for place in self._places.values()))

    def _take(self, slab: Slab, fillers: ThreadPoolExecutor) -> torch.Tensor:
        """Its bytes in one piece. What held them is free from here on."""
        place = host_memory(slab.num_bytes)
        parts = [(home, place[at : at + home.num_bytes]) for at, home in slab.homes]
        list(fillers.map(lambda part: part[0].read_into(part[1]), parts))
        for number, ((at, _), (_, part)) in enumerate(zip(slab.homes, parts, strict=True)):
            slab.homes[number] = at, InMemory(part)
        for parameter in slab.parameters:
            parameter.home = None
        return place

    def copy(self, slab: Slab, slot: torch.Tensor, passed: Any) -> Any:
        """Launch it on a stream of its own."""
        return _copy(self._places[id(slab)], slot, self._stream, passed)

    def wait(self, arrival: Any) -> None:
        """Of the device alone."""
        _wait(arrival)


class FromDisk:
    """Slabs in a file: a thread reads them into a window of host memory, from where the device copies."""

    def __init__(self, slabs: list[Slab], device: torch.device):
        largest = max(slab.num_bytes for slab in slabs)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._window = [host_memory(largest) for _ in range(NUM_SLOTS)]
        for buffer in self._window if self._stream else ():
            _check_lock(lock(buffer), "nvme", NUM_SLOTS * largest)
        self._left: list[Any] = [None] * NUM_SLOTS  # when the device has copied what was there
        self._next = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ring")

    def copy(self, slab: Slab, slot: torch.Tensor, passed: Any) -> "Future[Any]":
        """Have the thread read it and launch the copy."""
        return self._reader.submit(self._read, slab, slot, passed)

    def wait(self, arrival: "Future[Any]") -> None:
        """Of the host for the read, and of the device for the copy. Raises Stop where it could not be read."""
        _wait(arrival.result())

    def _read(self, slab: Slab, slot: torch.Tensor, passed: Any) -> Any:
        number, self._next = self._next, (self._next + 1) % NUM_SLOTS
        if self._left[number] is not None:
            self._left[number].synchronize()
        buffer = self._window[number]
        slab.read_into(buffer)
        self._left[number] = _copy(buffer[: slab.num_bytes], slot, self._stream, passed)
        return self._left[number]


def _lock(memory: torch.Tensor, device: torch.device) -> int:
    with torch.cuda.device(device):  # in a thread that begins with the first
        return lock(memory)


def _check_lock(code: int, offload: str, num_bytes: int) -> None:
    """Raise ConfigError where CUDA did not lock memory."""
    if code:
        raise ConfigError(
            f"deepspeed.offload_params={offload}: {num_bytes / 2**30:.2f} GiB of host memory cannot be locked for "
            f"copies to the GPU (CUDA error {code}). Raise the limit of locked memory (ulimit -l)"
            f"{', or use nvme' if offload == 'cpu' else ''}."
        )


def _copy(source: torch.Tensor, slot: torch.Tensor, stream: Any, passed: Any) -> Any:
    if stream is None:
        slot[: source.numel()].copy_(source)
        return None
    stream.wait_event(passed)
    with torch.cuda.stream(stream):
        slot[: source.numel()].copy_(source, non_blocking=True)
        return stream.record_event()


def _wait(arrived: Any) -> None:
    if arrived is not None:
        torch.cuda.current_stream().wait_event(arrived)


def make_ring(model: torch.nn.Module, away: Away, device: torch.device) -> Ring | None:
    """Have the decoder layers' weights pass through slots, and put all others that lie away on the device.

    None where no layer is known: everything is then on the device.
    """
    known = {id(one) for one in [*plain_layers(model), *(layer for layer in model.modules() if is_fused_layer(layer))]}
    slabs = [slab_of(layer, away) for layer in model.modules() if id(layer) in known]
    slabs = [slab for slab in slabs if slab.parameters]
    passing = {id(parameter) for slab in slabs for parameter in slab.parameters}
    for parameter in model.parameters():
        if hasattr(parameter, "home") and id(parameter) not in passing:
            parameter.data = values_of(parameter).to(device)
            for one in scales_of(getattr(parameter, "quant_state", None)):
                one.absmax = one.absmax.to(device)
            del parameter.home
    if not slabs:
        return None
    copies: Copies = FromDisk(slabs, device) if away.is_on_disk else FromMemory(slabs, device)
    return Ring(slabs, device, copies)


def is_fused_layer(layer: torch.nn.Module) -> bool:
    """Whether a module is a decoder layer that is fused."""
    return isinstance(layer.__dict__.get("fused"), FusedLayer)
