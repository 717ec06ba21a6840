"""Runs python -m qlora_ray.train as a user does, and reads what it left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def start(*arguments: str) -> subprocess.Popen:
    """Start the door with arguments, in a session of its own."""
    command = [sys.executable, "-m", "qlora_ray.train", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ.copy(),
    )


def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run the door to its end."""
    process = start(*arguments)
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


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while max(losses(run_dir), default=0) < step:
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < deadline, f"step {step} not reached in {timeout} s"
        time.sleep(0.1)
