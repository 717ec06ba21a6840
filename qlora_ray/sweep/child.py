"""python -m qlora_ray.sweep.child PARENT LOCK ...: the train door, in a process that cannot outlive its parent."""

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOCK_SECONDS = 180  # more than process.STOP_SECONDS


def main(argv: list[str]) -> int:
    """Become the train door with what follows PARENT, the process to die with, and LOCK, a file that one holds."""
    parent, lock, *arguments = argv
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it died before the kernel knew
        return 1
    # What this process becomes keeps its number, its end with its parent, and through the open file the lock.
    os.set_inheritable(_take(lock), True)
    os.execv(sys.executable, [sys.executable, "-m", "qlora_ray.train", *arguments])


@contextlib.contextmanager
def held(lock: str) -> Iterator[None]:
    """Hold a trial's lock, once the process before, which may still be saving, is gone. Raises BlockingIOError."""
    file = _take(lock)
    try:
        yield
    finally:
        os.close(file)


def _take(lock: str) -> int:
    """The open file that holds the lock."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
