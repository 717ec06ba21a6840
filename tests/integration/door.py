"""Runs python -m qlora_ray.<door> as a user does, and reads what it left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def start(*arguments: str, of: str = "train") -> subprocess.Popen:
    """Start a door with arguments, in a session of its own."""
    command = [sys.executable, "-m", f"qlora_ray.{of}", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ.copy(),
    )


def run(*arguments: str, of: str = "train", timeout: float = 400) -> subprocess.CompletedProcess:
    """Run a door to its end."""
    process = start(*arguments, of=of)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # without one that is being written
    return [json.loads(line) for line in lines]


def told(run_dir: Path) -> list[dict]:
    """What the lines of metrics.jsonl say of the training, without times and memory."""
    names = ("step", "loss", "eval_loss", "learning_rate", "num_tokens", "num_label_tokens", "sample_digests")
    lines = [{name: line[name] for name in names if name in line} for line in metrics(run_dir)]
    return [line for line in lines if len(line) > 1]


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run_dir) if "loss" in line}


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, timeout: float = 400) -> None:
    """Wait until a step is logged; a run that does not get there in time is ended, and the test fails."""
    wait_for(lambda: max(losses(run_dir), default=0) >= step, process, f"step {step}", timeout)


def wait_for(is_true: Callable[[], object], process: subprocess.Popen, what: str, timeout: float = 400) -> None:
    """Wait until something has happened in a run; where it does not in time, end the run and fail the test."""
    deadline = time.monotonic() + timeout
    while not is_true():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"no {what} in {timeout} s")
        time.sleep(0.1)
