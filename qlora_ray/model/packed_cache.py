"""The base's 4-bit weights, kept once they are packed, for other runs, trials and resumptions.

<ray.storage_path>/cache/base-<digest of what decides their bits>/
    packed-00000.safetensors    one of each worker that wrote: a weight by its name in the model, and beside it what
                                bitsandbytes keeps: weight.absmax, weight.quant_state.bitsandbytes__nf4, ...
    manifest.json               what they are of, and the bytes of each file; last, and the folder is renamed into place

One run at a time writes it; others load as if there were none. What does not lie in it is read from the base.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_ray.errors import ConfigError
from qlora_ray.model.pieces import Packed, lazily
from qlora_ray.model.tensors import DTYPES, TensorFiles, write_raw

MANIFEST = "manifest.json"
LAYOUT = 1
STORED = {f"torch.{name}": stored for stored, name in DTYPES.items()}
DECIDING = ("torch", "transformers", "bitsandbytes")
PARTS = 6  # tensors of a weight at most
BYTES_OF_AN_ENTRY = 160  # of the header, beside its name


@dataclass(frozen=True)
class Cached:
    """Where the packed weights of one base lie, or will lie."""

    folder: Path
    of: dict[str, Any]

    def is_there(self) -> bool:
        """Whether it was written whole."""
        return (self.folder / MANIFEST).is_file()

    def read(self) -> dict[str, Packed]:
        """The weights by name, none of them read. Raises ConfigError for files that are not those it was left with."""
        manifest = json.loads((self.folder / MANIFEST).read_text("utf-8"))
        for name, size in manifest["files"].items():
            file = self.folder / name
            found = file.stat().st_size if file.is_file() else 0
            if found != size:
                raise ConfigError(
                    f"{file}: has {found} bytes, and its {MANIFEST} says {size}. Delete {self.folder}, which is then "
                    "made again, or set model.cache_quantized=false."
                )
        files = TensorFiles([self.folder / name for name in manifest["files"]], str(self.folder))
        return {name: one for name, one in lazily(files, str(self.folder)).items() if isinstance(one, Packed)}

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process is the one that may write; it stays so until the block ends, or the process."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.lock", "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another holds it, or the file system has no locks
                yield False
                return
            yield True

    def begin(self) -> Path:
        """A folder to write into. Call it under the lock."""
        temporary = self.folder.with_name(f"{self.folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        return temporary

    def finish(self, temporary: Path) -> None:
        """Put what was written in its place. Call it under the lock, when every worker has written."""
        files = {file.name: file.stat().st_size for file in sorted(temporary.glob("*.safetensors"))}
        with (temporary / MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump({"of": self.of, "files": files}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(self.folder)


def cached(cache: Path, base: TensorFiles, quantization: dict[str, Any], compute_dtype: str, device: str) -> Cached:
    """Where the packed weights of a base lie; another base, setting, kind of device or library gives another place."""
    files = sorted({entry.file for entry in base.entries.values()})
    of = {
        "layout": LAYOUT,
        "base": base.sample_sha256(),
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "quantization": {name: quantization[name] for name in ("type", "double_quant")},
        "compute_dtype": compute_dtype,
        "device": device,
        "versions": {name: version(name) for name in DECIDING},
    }
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:24]
    return Cached(cache / f"base-{digest}", of)


class Writer:
    """Writes every `size`-th packed weight into a file of this worker."""

    def __init__(self, folder: Path, rank: int, size: int):
        self._rank, self._size, self._number = rank, size, 0
        self._file = (folder / f"packed-{rank:05}.safetensors").open("wb")
        self._room, self._header, self._end = 0, {"__metadata__": {"format": "pt"}}, 0
        self.failed: str | None = None  # why: the disk

    def make_room(self, names: list[str]) -> None:
        """Leave room for the header, which is known when all is written. Call it first, with the weights' names."""
        size = sum(PARTS * (len(name) + BYTES_OF_AN_ENTRY) for name in names) + BYTES_OF_AN_ENTRY
        self._room = math.ceil(size / 8) * 8
        self._file.seek(8 + self._room)

    @property
    def is_next(self) -> bool:
        """Whether this worker writes the next weight."""
        return self._number % self._size == self._rank and self.failed is None

    def add(self, name: str, packed: torch.Tensor, state: Any) -> None:
        """The next weight: every worker must call this, and the one whose turn it is writes."""
        if self.is_next:
            beside = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
            try:
                for key, value in {name: packed.view(-1, 1), **beside}.items():
                    self._write(key, value.cpu())
            except OSError as error:
                self.failed = str(error)
        self._number += 1

    def _write(self, name: str, value: torch.Tensor) -> None:
        write_raw(self._file, value)
        ends = [self._end, self._end + value.numel() * value.element_size()]
        self._header[name] = {"dtype": STORED[str(value.dtype)], "shape": list(value.shape), "data_offsets": ends}  # type: ignore[dict-item]
        self._end = ends[1]

    def close(self) -> str | None:
        """Write the header, and all to the disk; returns why that failed."""
        try:
            text = json.dumps(self._header).encode()
            assert len(text) <= self._room
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self.failed = self.failed or str(error)
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
        return self.failed
