"""Temporary folders for what Ray writes and nobody reads again, which do not outlive their process for long."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BEGUN_SECONDS = 60  # a folder this young may belong to a process that has yet to lock it


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[str]:
    """A folder whose name begins so; it ends with the block. Those that killed processes have left are removed, too.

    A process holds a lock on its folder, which ends with it however it ends.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError, PermissionError, BlockingIOError), _lock(left):
            if time.time() - left.stat().st_mtime > BEGUN_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=prefix)
    try:
        with _lock(Path(folder)):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError where another process holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
