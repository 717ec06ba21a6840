"""Weights that still lie in files, perhaps each in several: which bytes make up which values.

transformers' own conversions (core_model_loading) stack and join such weights without reading them; any other operation
reads the whole.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import BESIDE_PACKED, PACKED_STATE
from qlora_ray.model.tensors import BYTES, DTYPES, Entry, TensorFiles, read_bytes

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


@dataclass(frozen=True)
class Stretch:
    """Consecutive values of one tensor of a file."""

    name: str
    entry: Entry
    start: int
    stop: int

    def read(self) -> torch.Tensor:
        """The values, flat, as they are stored."""
        size = BYTES[self.entry.dtype]
        content = read_bytes(self.name, self.entry, self.start * size, self.stop * size)
        return content.view(getattr(torch, DTYPES[self.entry.dtype]))


@dataclass(frozen=True)
class Pieces:
    """Stands for a tensor: its values in their order, as stretches of what the files hold."""

    shape: torch.Size
    stored: str  # safetensors' name of the dtype
    stretches: tuple[Stretch, ...]
    device: Any = "cpu"  # where it will be read to
    dtype: torch.dtype | None = None  # that it then becomes; None: as stored

    def __getitem__(self, key: Any) -> "Pieces":
        assert key is Ellipsis, key  # how transformers asks for a whole tensor
        return self

    def get_dtype(self) -> str:
        """As safetensors' own slices."""
        return self.stored

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Pieces":
        """Note where to, and as what, it will be read."""
        return replace(self, device=self.device if device is None else device, dtype=dtype or self.dtype)

    def numel(self) -> int:
        """Its number of values."""
        return self.shape.numel()

    def between(self, start: int, stop: int) -> tuple[Stretch, ...]:
        """Where the values from `start` to `stop` of the flattened tensor lie."""
        found, at = [], 0
        for one in self.stretches:
            count = one.stop - one.start
            first, last = max(start, at), min(stop, at + count)
            if first < last:
                found.append(replace(one, start=one.start + first - at, stop=one.start + last - at))
            at += count
        return tuple(found)

    def cut(self, start: int, stop: int) -> torch.Tensor:
        """The values from `start` to `stop` of the flattened tensor, on the CPU, as they are stored."""
        stretches, at = self.between(start, stop), 0
        if len(stretches) == 1:
            return stretches[0].read()
        values = torch.empty(sum(one.stop - one.start for one in stretches), dtype=getattr(torch, DTYPES[self.stored]))
        for one in stretches:  # one after the other, so that no more than one is there twice
            values[at : (at := at + one.stop - one.start)] = one.read()
        return values

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        return self.cut(0, self.numel()).to(self.device, self.dtype).view(self.shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), more: dict | None = None) -> Any:
        joined = _join(function, *args, **(more or {})) if function in (torch.stack, torch.cat) else None
        return function(*_read_all(args), **(more or {})) if joined is None else joined


@dataclass(frozen=True)
class Packed:
    """Stands for a weight that bitsandbytes has packed, with what it keeps beside it."""

    shape: torch.Size  # of the weight
    content: Pieces  # uint8, two values each
    beside: dict[str, Pieces]

    def __getitem__(self, key: Any) -> "Packed":
        return self

    def get_dtype(self) -> str:
        """As safetensors' own slices."""
        return self.content.stored

    def to(self, *_: Any, **__: Any) -> "Packed":
        """It is what it is."""
        return self

    def numel(self) -> int:
        """The weight's number of values."""
        return self.shape.numel()

    def state(self, device: torch.device) -> "QuantState":
        """Its scales, read from the files."""
        from bitsandbytes.functional import QuantState

        return QuantState.from_dict({name: value.read() for name, value in self.beside.items()}, device)


def lazily(files: TensorFiles, key: str) -> dict[str, Pieces | Packed]:
    """Every weight of the files by name, none of them read. Raises ConfigError for what cannot be one."""
    found: dict[str, Pieces] = {}
    for name, entry in files.entries.items():
        if entry.dtype not in DTYPES:
            raise ConfigError(f"{key}: {name} is stored as {entry.dtype}. Save it in 16 or 32 bits.")
        everything = Stretch(name, entry, 0, math.prod(entry.shape))
        found[name] = Pieces(torch.Size(entry.shape), entry.dtype, (everything,))
    weights: dict[str, Pieces | Packed] = {name: one for name, one in found.items() if not BESIDE_PACKED.search(name)}
    for name, state in found.items():
        weight, is_state, _ = name.partition(PACKED_STATE)
        if is_state and weight in found:
            beside = {other[len(weight) + 1 :]: one for other, one in found.items() if other.startswith(f"{weight}.")}
            weights[weight] = Packed(_shape_in(name, state, key), found[weight], beside)
    return weights


def _shape_in(name: str, state: Pieces, key: str) -> torch.Size:
    try:
        return torch.Size(json.loads(bytes(state.read().tolist()))["shape"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{key}: {name} is damaged ({error}). Download or copy it again.") from None


def _join(function: Callable, parts: Any, dim: int = 0) -> Pieces | None:
    """What torch.stack or torch.cat would make of them; None where they have to be read for it."""
    parts = list(parts)
    kinds = {(type(part), getattr(part, "stored", None), len(part.shape)) for part in parts}
    if kinds != {(Pieces, parts[0].stored, len(parts[0].shape))}:
        return None
    shape = list(parts[0].shape)
    dim %= len(shape) + (function is torch.stack)
    if function is torch.stack:
        shape.insert(dim, len(parts))
    else:
        shape[dim] = sum(part.shape[dim] for part in parts)
    num_blocks = math.prod(shape[:dim])  # of each part, which lie by turns
    sizes = [part.numel() // num_blocks for part in parts]
    stretches = chain.from_iterable(
        part.between(number * size, (number + 1) * size)
        for number in range(num_blocks)
        for part, size in zip(parts, sizes, strict=True)
    )
    return replace(parts[0], shape=torch.Size(shape), stretches=tuple(stretches))


def _read_all(value: Any) -> Any:
    if isinstance(value, Pieces):
        return value.read()
    return type(value)(map(_read_all, value)) if isinstance(value, list | tuple) else value
