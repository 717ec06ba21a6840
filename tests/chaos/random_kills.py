"""A run whose processes are killed at random moments: one of them, each some seconds after the run goes on again."""

import contextlib
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.integration import door

# What is killed, by the title or the binary of its process, and how often: a worker is what dies in practice.
VICTIMS = {"worker": "ray::RayTrainWorker", "driver": "qlora_ray.train", "raylet": "raylet/raylet",
           "gcs": "gcs_server"}  # fmt: skip
OFTEN = {"worker": 6, "driver": 2, "raylet": 1, "gcs": 1}
TAKES_THE_DRIVER = {"driver", "raylet", "gcs"}  # a private Ray is one machine's: its driver ends with it


@dataclass
class Story:
    """What happened to one run."""

    kills: list[str] = field(default_factory=list)
    seconds_to_next_step: list[float] = field(default_factory=list)
    steps_redone: list[int] = field(default_factory=list)
    exit_code: int | None = None
    last_words: str = ""  # on stderr, of a run that failed


def live(
    settings: list[str], run: Path, num_kills: int, seed: int, timeout: float = 600, often: dict[str, int] = OFTEN
) -> Story:
    """Start a run, kill it `num_kills` times at moments drawn uniformly, resume it where that took the driver."""
    choose, story, deadline = random.Random(seed), Story(), time.monotonic() + timeout
    driver = door.start(*settings)
    try:
        while len(story.kills) < num_kills:
            victim = choose.choices(list(often), list(often.values()))[0]
            time.sleep(choose.uniform(0.0, 3.0))
            reached = max(door.losses(run), default=0)
            if driver.poll() is not None:
                break  # done, or given up: the exit code tells
            tree = processes(driver)
            if not kill(tree, victim):
                continue
            story.kills.append(f"{victim} after step {reached}")
            began = time.monotonic()
            if victim in TAKES_THE_DRIVER:
                driver.wait(timeout=90)
                end(tree)
                driver = resumed(settings, run)
            first = wait_for_next_step(driver, run, reached, deadline)
            if first is not None:
                story.seconds_to_next_step.append(round(time.monotonic() - began, 1))
                story.steps_redone.append(max(0, reached - first + 1))
        _, words = driver.communicate(timeout=max(1.0, deadline - time.monotonic()))
        story.exit_code, story.last_words = driver.returncode, words[-2000:]
    finally:
        end(processes(driver))
    return story


def processes(driver: subprocess.Popen) -> list[psutil.Process]:
    """A run's processes, the driver first; empty once that has ended."""
    if driver.poll() is not None:
        return []
    return [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]


def kill(tree: list[psutil.Process], victim: str) -> bool:
    """SIGKILL one process of a run; False where there is none of the kind just now."""
    found = []
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            if VICTIMS[victim] in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    if not found:
        return False
    (found[0] if victim == "driver" else found[-1]).send_signal(signal.SIGKILL)
    return True


def resumed(settings: list[str], run: Path) -> subprocess.Popen:
    """Start the same command with --resume, or anew where nothing was saved yet."""
    has_checkpoint = any((run / "checkpoints").glob("step_*/manifest.json"))
    if not has_checkpoint and run.exists():
        run.rename(run.with_name(f"{run.name}-{time.time_ns()}"))
    return door.start(*settings, *(["--resume"] if has_checkpoint else []))


def wait_for_next_step(driver: subprocess.Popen, run: Path, reached: int, deadline: float) -> int | None:
    """Wait until a step is done again or anew, and return the first such; None where the run ended first."""
    before = {line["step"]: line["time"] for line in door.metrics(run) if "loss" in line}
    newest = max(before.values(), default=0.0)
    while driver.poll() is None:
        assert time.monotonic() < deadline, f"no step after {reached} until the deadline"
        after = [line["step"] for line in door.metrics(run) if "loss" in line and line["time"] > newest]
        if after:
            return min(after)
        time.sleep(0.1)
    return None


def end(tree: list[psutil.Process]) -> None:
    """Kill what is left of a run."""
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil knows a process by its start, too: no other is hit
            process.kill()
