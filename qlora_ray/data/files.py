"""One file of records: what it holds, and its bytes. No record is read."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow.fs import FileSystem, LocalFileSystem

from qlora_ray.errors import ConfigError

KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
HASH_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class DataFile:
    """One file of records; picklable, so that tasks on other nodes can open it."""

    filesystem: FileSystem = field(hash=False)
    path: str
    name: str  # as the user knows it
    kind: str  # json (array or lines), csv, parquet, arrow
    compression: str | None
    num_bytes: int
    taken: tuple[int, int] | None = None  # [start, stop) of its records, where a slice takes not all

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def separator(self) -> str:
        """Between the cells of a CSV file."""
        return "\t" if ".tsv" in self.path.rsplit("/", 1)[-1].lower() else ","

    def open_stream(self):
        """The uncompressed bytes, from the start."""
        return self.filesystem.open_input_stream(self.path, compression=self.compression)

    def sha256(self) -> bytes:
        """Of the bytes as they lie on the disk."""
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
        return digest.digest()


def data_file(filesystem: FileSystem, path: str, name: str, num_bytes: int, where: str) -> DataFile:
    """The file at a path, its kind told by its name, else by its first bytes. Raises ConfigError for an empty one."""
    if not num_bytes:
        raise ConfigError(f"{where}: {'' if where.endswith('=' + name) else name + ': '}the file is empty.")
    stem, ending = path.rsplit("/", 1)[-1], Path(path).suffix.lower()
    compression = COMPRESSIONS.get(ending)
    kind = kind_by_name(stem)
    if kind is None:
        with filesystem.open_input_stream(path, compression=compression) as stream:
            start = stream.read(64)
        kind = "parquet" if start[:4] == b"PAR1" else "arrow" if start[:6] == b"ARROW1" else "json"
    return DataFile(filesystem, path, name, kind, compression, num_bytes)


def kind_by_name(name: str) -> str | None:
    """The kind that an ending tells."""
    path = Path(name.lower())
    return KINDS.get(Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix)
