"""Which files a config names: paths, globs, folders, URIs, hub ids, mixtures. No record is read."""

import fnmatch
import glob
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.fs
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from qlora_ray.config import Config, ConfigError, DataSource, find_file

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


@dataclass(frozen=True)
class Source:
    """An entry of data.train_file or data.validation_file."""

    key: str  # e.g. data.train_file, for messages
    entry: DataSource
    files: tuple[DataFile, ...]

    @property
    def num_bytes(self) -> int:
        """Roughly what there is to parse."""
        return sum(file.num_bytes * (4 if file.compression or file.kind == "parquet" else 1) for file in self.files)

    def damaged(self, file: DataFile, problem: str) -> ConfigError:
        """What to raise for a file that stops being what it claims to be."""
        name = "" if file.name == self.entry.path else f"{file.name}: "
        return ConfigError(f"{self.key}={self.entry.path}: {name}{problem}.")


def find_sources(config: Config, key: str, *, download: bool = True) -> tuple[Source, ...]:
    """The sources of "train_file" or "validation_file"; empty where not given. Raises ConfigError.

    Without `download`, hub ids are left out: they take seconds.
    """
    data = config.data
    split = data.split if key == "train_file" else "validation"
    found = []
    for entry in data.sources(key):
        entry = entry.model_copy(update={"split": entry.split or split, "revision": entry.revision or data.revision})
        if download or not _is_hub_id(entry.path):
            found.append(find_source(entry, f"data.{key}"))
    return tuple(found)


def find_source(entry: DataSource, key: str) -> Source:
    """The files that an entry names; `key` is what messages call it. Raises ConfigError."""
    entry = entry.model_copy(update={"split": entry.split or "train"})
    files = _from_hub(entry, key) if _is_hub_id(entry.path) else _find(entry, key)
    return Source(key, entry, tuple(files))


def content_hash(source: Source) -> bytes:
    """sha256 over the bytes of all files of a source, in order, and how they are parsed.

    Reads them all: that is exact, at about 1.5 GB/s.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(4) as threads:  # hashlib and pyarrow let go of the interpreter
        for file, sha256 in zip(source.files, threads.map(DataFile.sha256, source.files), strict=True):
            digest.update(sha256 + f"{file.kind} {file.compression} {file.separator}".encode())
    return digest.digest()


def _find(entry: DataSource, key: str) -> list[DataFile]:
    name = entry.path
    where = f"{key}={name}"
    try:
        filesystem, path, is_literal = _open_filesystem(name)
        info = filesystem.get_file_info(path)
        if info.type == FileType.File:
            return [_data_file(filesystem, path, name, info.size, where)]
        if info.type == FileType.Directory:
            return _in_folder(filesystem, path, entry, where)
        matches = [] if is_literal else _glob(filesystem, path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    if not matches:
        raise ConfigError(f"{where}: {'no such file' if is_literal else 'no file matches'}.")
    return [_data_file(filesystem, info.path, info.path, info.size, where) for info in matches]


def _open_filesystem(name: str) -> tuple[FileSystem, str, bool]:
    is_literal = not any(character in name for character in "*?[")
    if "://" not in name:
        return LocalFileSystem(), str(find_file(name).absolute()), is_literal
    try:
        filesystem, path = FileSystem.from_uri(name)
    except (ValueError, pyarrow.ArrowException):  # a scheme that pyarrow leaves to fsspec
        import fsspec

        try:
            inner, path = fsspec.core.url_to_fs(name)
        except (ImportError, ValueError) as error:
            raise OSError(str(error)) from error
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(inner))
    return filesystem, path, is_literal


def _glob(filesystem: FileSystem, pattern: str) -> list[pyarrow.fs.FileInfo]:
    if isinstance(filesystem, LocalFileSystem):
        found = filesystem.get_file_info(sorted(glob.glob(pattern, recursive=True)))
    else:
        fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        below = filesystem.get_file_info(FileSelector(fixed, recursive=True, allow_not_found=True))
        found = sorted((i for i in below if fnmatch.fnmatchcase(i.path, pattern)), key=lambda info: info.path)
    return [info for info in found if info.type == FileType.File]


def _in_folder(filesystem: FileSystem, path: str, entry: DataSource, where: str) -> list[DataFile]:
    below = {
        info.path.removeprefix(path).lstrip("/"): info
        for info in filesystem.get_file_info(FileSelector(path, recursive=True))
        if info.type == FileType.File
    }
    if "dataset_dict.json" in below:  # datasets.DatasetDict.save_to_disk
        splits = sorted({name.split("/")[0] for name in below if "/" in name})
        if entry.split not in splits:
            raise ConfigError(f"{where}: has no split {entry.split!r}. Set data.split to one of: {', '.join(splits)}.")
        below = {name: info for name, info in below.items() if name.startswith(f"{entry.split}/")}
    files = [
        _data_file(filesystem, info.path, info.path, info.size, where)
        for name, info in sorted(below.items())
        if not re.search(r"(^|/)[._]", name)
        and _kind_by_name(name)
        and name.rpartition("/")[2] not in ("dataset_info.json", "state.json", "dataset_dict.json")
    ]
    if not files:
        raise ConfigError(f"{where}: is a folder without data files ({', '.join(KINDS)}, also .gz and .zst).")
    return files


def _data_file(filesystem: FileSystem, path: str, name: str, num_bytes: int, where: str) -> DataFile:
    if not num_bytes:
        raise ConfigError(f"{where}: {'' if where.endswith('=' + name) else name + ': '}the file is empty.")
    stem, ending = path.rsplit("/", 1)[-1], Path(path).suffix.lower()
    compression = COMPRESSIONS.get(ending)
    kind = _kind_by_name(stem)
    if kind is None:
        with filesystem.open_input_stream(path, compression=compression) as stream:
            start = stream.read(64)
        kind = "parquet" if start[:4] == b"PAR1" else "arrow" if start[:6] == b"ARROW1" else "json"
    return DataFile(filesystem, path, name, kind, compression, num_bytes)


def _kind_by_name(name: str) -> str | None:
    path = Path(name.lower())
    return KINDS.get(Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix)


def _is_hub_id(name: str) -> bool:
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None
    return is_id and _kind_by_name(name) is None and not find_file(name).exists()


def _from_hub(entry: DataSource, key: str) -> list[DataFile]:
    """The Arrow files that `datasets` keeps of a hub data set, downloading it where it is not there yet."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    where = f"{key}={entry.path}"
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(entry.path, entry.name, revision=entry.revision, split=entry.split)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: no such file, and the hub did not give it: {reason}") from error
    local = LocalFileSystem()
    paths = [str(file["filename"]) for file in found.cache_files]
    return [DataFile(local, p, p, "arrow", None, local.get_file_info(p).size) for p in paths]
