"""Runs python -m qlora_ray.<door> as a user does, and reads what it left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
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


def run(*arguments: str, of: str = "train", timeout: float = 240) -> subprocess.CompletedProcess:
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


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run_dir) if "loss" in line}


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while max(losses(run_dir), default=0) < step:
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < deadline, f"step {step} not reached in {timeout} s"
        time.sleep(0.1)
