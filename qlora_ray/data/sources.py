"""Which files a config names: paths, globs, folders, URIs, hub ids, mixtures. No record is read."""

import fnmatch
import glob
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow
import pyarrow.fs
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from qlora_ray.config import Config, DataSource, find_file
from qlora_ray.data.files import KINDS, DataFile, data_file, kind_by_name
from qlora_ray.data.splits import Splits, choose, splits_by_card, splits_by_name
from qlora_ray.errors import ConfigError

WHOLE = ""  # the split of files whose names tell of none


@dataclass(frozen=True)
class Source:
    """An entry of data.train_file or data.validation_file."""

    key: str  # e.g. data.train_file, for messages
    entry: DataSource
    files: tuple[DataFile, ...]
    unread: tuple[str, ...] = ()  # names of files of other splits

    @property
    def note(self) -> str | None:
        """What is worth telling of files beside those that are read."""
        if not self.unread:
            return None
        names, more = ", ".join(self.unread[:3]), ", ..." if len(self.unread) > 3 else ""
        read = f"split {self.entry.split} has {len(self.files)} of its files"
        return f"{self.key}={self.entry.path}: {read}; not read: {names}{more}"

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
    if data.revision and not any(
        _is_hub_id(e.path) for k in ("train_file", "validation_file") for e in data.sources(k)
    ):
        raise ConfigError(f"data.revision={data.revision}: no file named here is a hub data set. Leave it out.")
    split = data.split if key == "train_file" else "validation"
    found = []
    for entry in data.sources(key):
        is_hub_id = _is_hub_id(entry.path)
        revision = entry.revision or (data.revision if is_hub_id else None)
        if download or not is_hub_id:
            asked = {"split": entry.split or split, "revision": revision}
            found.append(find_source(entry.model_copy(update=asked), f"data.{key}"))
    return tuple(found)


def find_source(entry: DataSource, key: str) -> Source:
    """The files that an entry names; `key` is what messages call it. Raises ConfigError.

    An entry without a split means a hub data set's "train", and all that lies elsewhere, if that is one split.
    """
    where, spec = f"{key}={entry.path}", entry.split
    if _is_hub_id(entry.path):
        splits, spec = _from_hub(entry, where), spec or "train"
    else:
        splits = _find(entry, where)
    files = [file for some in splits.values() for file in some]
    if list(splits) == [WHOLE]:  # it may be called by either name
        splits = dict.fromkeys(("train", "validation") if key == "data.validation_file" else ("train",), files)
        spec = spec or "train"
    if spec is None:
        if len(splits) > 1:
            raise ConfigError(f"{where}: holds the splits {', '.join(sorted(splits))}. Name the files of one of them.")
        (spec,) = splits
    chosen = choose(splits, spec, where)
    unread = sorted({file.name for file in files} - {file.name for file in chosen})
    return Source(key, entry.model_copy(update={"split": spec}), tuple(chosen), tuple(unread))


def content_hash(source: Source) -> bytes:
    """sha256 over the bytes of all files of a source, in order, and how they are parsed.

    Reads them all: that is exact, at about 1.5 GB/s.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(4) as threads:  # hashlib and pyarrow let go of the interpreter
        for file, sha256 in zip(source.files, threads.map(DataFile.sha256, source.files), strict=True):
            slice_ = f" {file.taken}" if file.taken else ""
            digest.update(sha256 + f"{file.kind} {file.compression} {file.separator}{slice_}".encode())
    return digest.digest()


def _find(entry: DataSource, where: str) -> Splits:
    """The files of each split that a path, glob, folder or URI names; under WHOLE where nothing tells of splits."""
    name = entry.path
    try:
        filesystem, path, is_literal = _open_filesystem(name)
        info = filesystem.get_file_info(path)
        if info.type == FileType.Directory:
            return _in_folder(filesystem, path, entry, where)
        is_file = info.type == FileType.File
        matches = [info] if is_file else [] if is_literal else _glob(filesystem, path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    if not matches:
        raise ConfigError(f"{where}: {'no such file' if is_literal else 'no file matches'}.")
    _refuse_hub_settings(entry, where, ("name", "revision"))
    return {WHOLE: [data_file(filesystem, i.path, name if is_file else i.path, i.size, where) for i in matches]}


def _refuse_hub_settings(entry: DataSource, where: str, settings: tuple[str, ...]) -> None:
    for setting in settings:
        if value := getattr(entry, setting):
            raise ConfigError(f"{where}: {setting}={value} is for hub data sets, and this is none. Leave it out.")


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


def _in_folder(filesystem: FileSystem, path: str, entry: DataSource, where: str) -> Splits:
    below = {
        info.path.removeprefix(path).lstrip("/"): info
        for info in filesystem.get_file_info(FileSelector(path, recursive=True))
        if info.type == FileType.File
    }
    names = [
        name
        for name in sorted(below)
        if not re.search(r"(^|/)[._]", name)
        and kind_by_name(name)
        and name.rpartition("/")[2]
        not in ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
    ]
    if not names:
        raise ConfigError(f"{where}: is a folder without data files ({', '.join(KINDS)}, also .gz and .zst).")
    listed = None
    if "README.md" in below:
        with filesystem.open_input_stream(below["README.md"].path) as card:
            listed = splits_by_card(card.read().decode(errors="replace"), names, entry, where)
    _refuse_hub_settings(entry, where, ("revision",) if listed else ("name", "revision"))
    if "dataset_dict.json" in below:  # datasets.DatasetDict.save_to_disk
        splits = sorted({name.split("/")[0] for name in names if "/" in name})
        listed = {split: [name for name in names if name.startswith(f"{split}/")] for split in splits}
    listed = listed or splits_by_name(names) or {WHOLE: names}
    files = {name: data_file(filesystem, below[name].path, below[name].path, below[name].size, where) for name in names}
    return {split: [files[name] for name in some] for split, some in listed.items()}


def _is_hub_id(name: str) -> bool:
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None
    return is_id and kind_by_name(name) is None and not find_file(name).exists()


def _from_hub(entry: DataSource, where: str) -> Splits:
    """The Arrow files that `datasets` keeps of a hub data set, downloading it where it is not there yet."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(entry.path, entry.name, revision=entry.revision)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: no such file, and the hub did not give it: {reason}") from error
    local = LocalFileSystem()
    paths = {split: [str(file["filename"]) for file in one.cache_files] for split, one in found.items()}
    return {
        split: [DataFile(local, p, p, "arrow", None, local.get_file_info(p).size) for p in some]
        for split, some in paths.items()
    }
