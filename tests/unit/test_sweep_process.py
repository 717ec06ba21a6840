"""A trial's process does not outlive whoever started it, and one trial has one process."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import psutil


def wait_until(happened, seconds=30):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start_parent(tmp_path):
    """A process that starts a trial's process, which waits for its config for ever; returns both."""
    config, lock = tmp_path / "config.yaml", tmp_path / "lock"
    os.mkfifo(config)
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'qlora_ray.sweep.leash', str(os.getpid()), "
        f"{str(lock)!r}, '-c', {str(config)!r}], start_new_session=True)\n"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    wait_until(lambda: lock.exists() and not is_free(lock))
    return parent, child, lock


def is_free(lock) -> bool:
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def test_trial_dies_with_its_parent_however_that_ends(tmp_path):
    parent, child, lock = start_parent(tmp_path)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=5)
    assert is_free(lock)  # for the process that goes on with the trial


def test_trial_whose_parent_is_gone_already_does_not_start(tmp_path):
    command = [sys.executable, "-m", "qlora_ray.sweep.leash", "999999999", str(tmp_path / "lock")]
    assert subprocess.run(command, timeout=60).returncode == 1
    assert not (tmp_path / "lock").exists()
