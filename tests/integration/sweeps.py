"""Runs python -m qlora_ray.tune as a user does, and reads what it left."""

import json
import subprocess
from pathlib import Path

import psutil

from tests.integration import door

SMALL = [
    "-c", "configs/sweep.yaml", "training.eval_every_steps=5", "checkpoint.every_steps=5", "logging.every_steps=1",
    "evaluation.num_prompts=0", "evaluation.num_samples=0",
]  # fmt: skip


def _asked(storage, name, more: tuple[str, ...]) -> list[str]:
    return [*SMALL, f"ray.storage_path={storage}", f"ray.run_name={name}", *more]


def start(storage, name, *more: str) -> subprocess.Popen:
    """Start a small sweep, in a session of its own."""
    return door.start(*_asked(storage, name, more), of="tune")


def run(storage, name, *more: str, timeout: float = 280) -> subprocess.CompletedProcess:
    """Run a small sweep to its end."""
    return door.run(*_asked(storage, name, more), of="tune", timeout=timeout)


def events(sweep: Path, kind: str | None = None) -> list[dict]:
    """The whole lines of the ledger, of one kind or all."""
    path = sweep / "trials.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [event for event in found if kind in (None, event["event"])]


def outcome(sweep: Path) -> dict[str, tuple]:
    """Of each trial: its parameters, how it ended, and each report once."""
    trials = {event["trial"]: event["parameters"] for event in events(sweep, "trial")}
    ends = {event["trial"]: event["status"] for event in events(sweep, "end")}
    reports = {(event["trial"], event["step"]): event["eval_loss"] for event in events(sweep, "report")}
    return {
        name: (parameters, ends.get(name), {step: loss for (of, step), loss in reports.items() if of == name})
        for name, parameters in trials.items()
    }


def wait_for_checkpoints(sweep: Path, number: int, driver: subprocess.Popen, timeout: float = 120) -> None:
    """Wait until this many trials have a checkpoint."""
    there = "trials/*/checkpoints"
    door.wait_for(lambda: len(list(sweep.glob(there))) >= number, driver, f"{number} trials with checkpoints", timeout)


def trial_processes(sweep: Path) -> list[psutil.Process]:
    """Processes of trials of this sweep that are alive."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "qlora_ray.train" in line and any(str(sweep) in part for part in line):
            found.append(process)
    return found
