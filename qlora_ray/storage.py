"""Where a run lives: one pyarrow filesystem and path, local or remote, with writes that are whole or absent."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs

from qlora_ray import environment
from qlora_ray.errors import ConfigError

SHARE_IT = "Use a folder that all nodes share (NFS), or a URI such as s3://."
FREE_SPACE = "Free space there; --resume goes on."
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Folder:
    """A folder on any pyarrow filesystem; picklable, so that workers get the driver's."""

    filesystem: pyarrow.fs.FileSystem = field(hash=False)
    path: str

    def __truediv__(self, name: str) -> "Folder":
        return Folder(self.filesystem, f"{self.path}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine, NFS included."""
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Folder":
        """The folder it lies in."""
        return Folder(self.filesystem, self.path.rsplit("/", 1)[0])

    def size(self) -> int | None:
        """Bytes of this file; None where there is none."""
        return self.filesystem.get_file_info(self.path).size

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self.filesystem.get_file_info(self.path).type != pyarrow.fs.FileType.NotFound

    def list(self) -> list[str]:
        """Names in the folder, sorted; empty where there is no folder."""
        return sorted(info.base_name for info in self._infos())

    def sizes(self) -> dict[str, int]:
        """Bytes of each file in the folder by name; empty where there is no folder."""
        return {info.base_name: info.size for info in self._infos() if info.type == pyarrow.fs.FileType.File}

    def _infos(self) -> Sequence[Any]:
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        try:
            return self.filesystem.get_file_info(selector)
        except FileNotFoundError:  # another process made the folder between Arrow's two looks
            return self.filesystem.get_file_info(selector)

    def make(self) -> "Folder":
        """Make the folder and those above it, where they are missing; returns it."""
        self.filesystem.create_dir(self.path, recursive=True)
        return self

    def read_bytes(self) -> bytes:
        """The whole of this file. Raises FileNotFoundError."""
        with self.filesystem.open_input_file(self.path) as file:
            return file.read()

    def write_bytes(self, content: bytes) -> None:
        """Write this file whole: on a local disk to a temporary name, fsynced, renamed; objects appear whole anyway."""
        with self.open_to_write() as file:
            file.write(content)

    @contextlib.contextmanager
    def open_to_write(self) -> Iterator[Any]:
        """A stream to write this file with, which appears whole when the block ends, and not at all if it fails."""
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path) as stream:
                yield stream
            return
        folder, name = os.path.split(self.path)
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o600 if name.startswith(".") else 0o644)
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(folder)

    def delete(self) -> None:
        """Remove this file, or folder with all in it; nothing where there is none."""
        info = self.filesystem.get_file_info(self.path)
        if info.type == pyarrow.fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif info.type == pyarrow.fs.FileType.File:
            self.filesystem.delete_file(self.path)

    def rename(self, target: "Folder") -> None:
        """Move it, and on a local disk sync the folder that it now lies in. Object stores move files alone."""
        self.filesystem.move(self.path, target.path)
        if self.is_local:
            sync_folder(os.path.dirname(target.path))


def open_folder(storage_path: str) -> Folder:
    """The folder behind `ray.storage_path`. Raises ConfigError for a scheme or path that cannot be used.

    A relative path counts from the current folder; in a Ray job, whose upload Ray deletes, from the home
    folder.
    """
    start = Path.home() if environment.in_job(os.environ) else Path.cwd()
    try:
        if "://" in storage_path:
            filesystem, path = pyarrow.fs.FileSystem.from_uri(storage_path)
        else:
            filesystem, path = pyarrow.fs.LocalFileSystem(), str((start / Path(storage_path).expanduser()).resolve())
    except (OSError, ValueError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"ray.storage_path={storage_path}: {error}") from error
    return Folder(filesystem, path.rstrip("/"))


def check_writable(folder: Folder) -> None:
    """Write and remove a file below the nearest existing parent. Raises ConfigError."""
    if not folder.is_local:
        return  # the first write will tell; a probe costs money and may need rights that a run does not
    parent = Path(folder.path)
    while not parent.exists():
        parent = parent.parent
    try:
        if not parent.is_dir():
            raise NotADirectoryError(20, f"{parent} is a file")
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"ray.storage_path={folder.path}: not writable: {error.strerror}. Choose another folder."
        ) from None


def check_space(run: Folder, needed: int) -> None:
    """Refuse to start a run of `needed` bytes on a local disk that has less. Raises ConfigError.

    What the run holds already, where it goes on, counts as part of what it needs.
    """
    if not run.is_local:
        return
    free = shutil.disk_usage(run.parent.make().path).free
    held = sum(path.stat().st_size for path in Path(run.path).rglob("*") if path.is_file())
    if free + held < needed:
        raise ConfigError(
            f"ray.storage_path={run.parent.path}: {free / 2**20:,.0f} MiB free, the run needs "
            f"{(needed - held) / 2**20:,.0f} MiB. "
            "Free space, lower checkpoint.keep, or choose another folder."
        )


def unless_full(write: Callable[[], object], what: str, run: Folder) -> str | None:
    """Do what writes `what` into a run; returns what is wrong where the disk is full. Raises any other error."""
    try:
        write()
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        return f"{what} could not be written to {run.path}: {error.strerror}"
    return None


def sync_folder(path: str) -> None:
    """fsync a local folder, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
