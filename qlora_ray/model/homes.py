"""Where weights lie that are not on the device: in host memory, or in a file of the worker's own on a local disk.

The file has no name, so that nobody can change it or leave it behind: it is gone when its worker ends, however it ends.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qlora_ray.errors import ConfigError, Stop
from qlora_ray.model.load import Whole

NETWORKS = {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "glusterfs", "gpfs", "9p", "fuse", "afs"}
BLOCK, NUM_READERS = 2**24, 8  # bytes of one read, and reads at a time: a disk wants several


class Home(Protocol):
    """The bytes of one tensor."""

    @property
    def num_bytes(self) -> int:
        """How many there are."""

    def read_into(self, out: torch.Tensor) -> None:
        """Write them into uint8 values."""


@dataclass(frozen=True)
class InMemory:
    """In host memory."""

    content: torch.Tensor  # uint8

    @property
    def num_bytes(self) -> int:
        """As many as it holds."""
        return self.content.numel()

    def read_into(self, out: torch.Tensor) -> None:
        """A copy."""
        out.copy_(self.content)


@dataclass(frozen=True)
class OnDisk:
    """A stretch of a file."""

    file: "DiskFile"
    start: int
    num_bytes: int

    def read_into(self, out: torch.Tensor) -> None:
        """Read all of it. Raises Stop where the disk does not give it."""
        self.file.read_into(out, self.start)


class DiskFile:
    """One file without a name in a folder, which is written once. Raises ConfigError where it cannot be."""

    def __init__(self, folder: str, num_bytes: int):
        self.key = f"deepspeed.nvme_path={folder}"
        try:
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as the worker
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        except OSError as error:
            free = f", {disk_free(folder) / 2**30:.1f} GiB are free" if os.path.isdir(folder) else ""
            raise ConfigError(
                f"{self.key}: {error.strerror}; the base takes {num_bytes / 2**30:.1f} GiB there{free}. "
                "Name a folder on a local disk that the workers can write to and that has room."
            ) from None
        self._end = 0
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="disk")

    def put(self, content: torch.Tensor) -> OnDisk:
        """Append uint8 values."""
        values: Any = content.cpu().numpy()
        view, start = memoryview(values), self._end
        while view:
            try:
                written = os.pwrite(self._file.fileno(), view[: 2**30], self._end)
            except OSError as error:
                raise ConfigError(f"{self.key}: {error.strerror}.") from None
            self._end, view = self._end + written, view[written:]
        return OnDisk(self, start, content.numel())

    def forget(self, start: int = 0, num_bytes: int = 0) -> None:
        """Have the system drop from memory what it keeps of the file, or of a stretch: the disk gives it next time."""
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), start, num_bytes, os.POSIX_FADV_DONTNEED)

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Fill uint8 values on the CPU from there on. Raises Stop where the disk does not give them."""
        values: Any = out.numpy()
        view = memoryview(values)
        parts = [(view[at : at + BLOCK], start + at) for at in range(0, len(view), BLOCK)]
        list(self._readers.map(lambda part: self._read(*part), parts))

    def _read(self, view: memoryview, start: int) -> None:
        while view:
            try:
                count = os.preadv(self._file.fileno(), [view], start)
            except OSError as error:
                raise Stop(f"{self.key}: {error.strerror}. {SAVED}") from None
            if not count:
                raise Stop(f"{self.key}: the file of the base was cut short at byte {start:,}. {SAVED}")
            start, view = start + count, view[count:]


SAVED = "No step was taken with wrong weights, and the last checkpoint is good."


def disk_free(folder: str) -> int:
    """Bytes that are free in a folder's file system."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def network_file_system(folder: str, mounts: str = "/proc/mounts") -> str | None:
    """The kind of the network file system that a folder lies on; None where it lies on a disk of this machine."""
    place, found = os.path.realpath(folder), ("", "")
    with open(mounts, encoding="utf-8") as lines:
        for line in lines:
            _, point, kind, *_ = line.split()
            inside = place == point or place.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(found[0]):
                found = point, kind
    return found[1] if found[1].split(".")[0] in NETWORKS or found[1] in NETWORKS else None


class Away(Whole):
    """A keeper of a whole base that leaves its weights off the device, and a place for their values there.

    Each parameter gets `home`, where its values are, and `whole_shape`.
    """

    def __init__(self, file: DiskFile | None = None):
        self._file = file

    @property
    def is_on_disk(self) -> bool:
        """Whether they go to a file."""
        return self._file is not None

    def keep(self, parameter: Any, share: torch.Tensor) -> None:
        """Put the values away."""
        parameter.whole_shape = parameter.shape
        parameter.home = self.put(share)
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def keep_scales(self, state: Any) -> None:
        """Put them into host memory."""
        for one in scales_of(state):
            one.absmax = one.absmax.cpu()

    def homes_of_scales(self, parameter: Any) -> list[Home]:
        """Homes for those of a packed weight."""
        return [self.put(one.absmax) for one in scales_of(getattr(parameter, "quant_state", None))]

    def put(self, values: torch.Tensor) -> Home:
        """A home for values."""
        content = values.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return self._file.put(content) if self._file else InMemory(content)

    def whole(self, parameter: Any) -> torch.Tensor:
        """What was put away."""
        return values_of(parameter)


def scales_of(state: Any) -> list[Any]:
    """What holds scales of a packed weight, in `absmax`: its state, and that of the scales themselves."""
    return [] if state is None else [state, state.state2] if state.nested else [state]


def values_of(parameter: Any, device: torch.device | str = "cpu") -> torch.Tensor:
    """The values of a parameter that was put away, on a device."""
    content = torch.empty(parameter.home.num_bytes, dtype=torch.uint8, device=device)
    parameter.home.read_into(content)
    return content.view(parameter.dtype).view(parameter.whole_shape)
