"""python -m qlora_ray.sweep.leash PARENT LOCK ...: the train door, in a process that cannot outlive its parent."""

import ctypes
import fcntl
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOCK_SECONDS = 60


def main(argv: list[str]) -> int:
    """Train with the arguments after PARENT (the process to die with) and LOCK (a file that one trial holds)."""
    parent, lock, *arguments = argv
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it died before the kernel knew
        return 1
    held = _hold(lock)
    try:
        from qlora_ray import train

        return train.main(arguments)
    finally:
        os.close(held)


def _hold(lock: str) -> int:
    """Wait until the process of the same trial before this one, whose sweep was killed, is gone."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
