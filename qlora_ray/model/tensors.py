"""safetensors files read and written one tensor at a time, without mapping them into memory."""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qlora_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

SAMPLE_BYTES = 4096
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: str  # safetensors' name, e.g. BF16
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    size: int  # bytes


class TensorFiles:
    """The tensors of some safetensors files, by name, in the files' order. Raises ConfigError for a damaged file."""

    def __init__(self, files: list[Path], key: str):
        self.entries: dict[str, Entry] = {}
        for file in files:
            self.entries |= read_header(file, key)

    def read(self, name: str) -> "torch.Tensor":
        """One tensor, read from the disk into memory of its own."""
        import torch

        entry = self.entries[name]
        return read_bytes(name, entry, 0, entry.size).view(getattr(torch, DTYPES[entry.dtype])).reshape(entry.shape)

    def sample_sha256(self) -> str:
        """Digest (16 hex digits) of each tensor's name, shape and first 4 KiB: tells bases of one shape apart."""
        digest = hashlib.sha256()
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name}{entry.shape}{entry.dtype}".encode())
            with entry.file.open("rb") as file:
                file.seek(entry.offset)
                digest.update(file.read(min(SAMPLE_BYTES, entry.size)))
        return digest.hexdigest()[:16]


def read_bytes(name: str, entry: Entry, start: int, stop: int) -> "torch.Tensor":
    """Some bytes of a tensor, read from the disk into memory of their own: uint8. Raises ConfigError."""
    import torch

    content = torch.empty(stop - start, dtype=torch.uint8)
    read_into(content, name, entry, start)
    return content


def read_into(content: "torch.Tensor", name: str, entry: Entry, start: int) -> None:
    """Fill uint8 values on the CPU with the bytes of a tensor from there on. Raises ConfigError."""
    view, done = memoryview(content.numpy()), 0  # type: ignore[arg-type]
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.offset + start)
        while done < len(view):
            count = file.readinto(view[done:])  # type: ignore[arg-type]
            if not count:
                raise ConfigError(f"{entry.file}: ends inside the tensor {name}. Download or copy it again.")
            done += count


def read_header(file: Path, key: str) -> dict[str, Entry]:
    """The entries of one file. Raises ConfigError where it is missing, cut off or not a safetensors file."""
    # 8 bytes little-endian header length, then that much JSON; offsets count from its end.
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > total:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        entries = {}
        for name, value in header.items():
            if name == "__metadata__":
                continue
            begin, end = value["data_offsets"]
            shape = tuple(value["shape"])
            if 8 + length + end > total:
                raise ValueError("tensors cut off")
            if value["dtype"] in BYTES and end - begin != math.prod(shape) * BYTES[value["dtype"]]:
                raise ValueError(f"tensor {name} is not a dense {value['dtype']} of shape {shape}")
            entries[name] = Entry(file, value["dtype"], shape, 8 + length + begin, end - begin)
    except FileNotFoundError:
        raise ConfigError(f"{key}: {file.name} is missing from the folder. Download or copy it again.") from None
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"{key}: {file.name} is damaged ({error}). Download or copy it again.") from None
    return entries


def write_tensors(
    file: IO[bytes], layout: dict[str, tuple[str, tuple[int, ...]]], tensors: Iterator["torch.Tensor"]
) -> int:
    """Write a safetensors file: `layout` names dtype and shape of each tensor, which then come one at a time.

    Returns the bytes of the tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
        assert tuple(tensor.shape) == shape and str(tensor.dtype) == f"torch.{DTYPES[dtype]}", name
        write_raw(file, tensor)
    return offset


def write_raw(file: IO[bytes], tensor: "torch.Tensor") -> None:
    """The bytes of a tensor, without a copy of them."""
    import torch

    flat = tensor.detach().contiguous().flatten()
    if flat.numel():
        file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
