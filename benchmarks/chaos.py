"""Runs that are killed, frozen and damaged, beside a stock Ray Train + DeepSpeed loop that meets the same.

    python -m benchmarks.chaos [--runs 8] [--kills 7]      ours: random kills of random processes, as tests/chaos does
    python -m benchmarks.chaos --victim worker             the same, of workers alone: how soon does training go on?
    python -m benchmarks.chaos --stuck [--runs 2]          ours: frozen, sleeping and out of step, with short deadlines
    python -m benchmarks.chaos --control                   both, one fault a run; Markdown table

CPU, two workers, ZeRO-3, NF4, a checkpoint every 5 steps. "Not noticed" means: no new step within LIMIT_SECONDS.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos import random_kills, test_faults
from tests.chaos.test_faults import settings
from tests.integration import door

STEPS, AT_STEP, LIMIT_SECONDS = 30, 13, 90
FAULTS = (
    "nothing",
    "SIGKILL of a worker",
    "SIGKILL of the driver, same command again",
    "SIGSTOP of a worker",
    "SIGKILL of the driver, one bit of the newest checkpoint flips, same command again",
)


@dataclass(frozen=True)
class Side:
    """One of the two: how it is started, and where it tells its steps and its result."""

    name: str
    start: Callable[[str, bool], subprocess.Popen]  # run name, whether to resume
    steps: Callable[[str], list[dict]]
    result: Callable[[str], str | None]  # sha256 of what was trained
    newest_file: Callable[[str], Path]  # of the newest checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--kills", type=int, default=7)
    parser.add_argument("--victim", choices=random_kills.VICTIMS, help="kill no other process")
    parser.add_argument("--stuck", action="store_true")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, for machines with many cores")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.control:
            control(Path(folder), arguments.parallel)
        elif arguments.stuck:
            for number in range(arguments.runs):
                for fault in ("SIGSTOP of a worker", "sleep", "skip"):
                    print(f"{fault}: {stuck(Path(folder), f'{fault.split()[0]}-{number}', fault)}", flush=True)
        else:
            often = {arguments.victim: 1} if arguments.victim else random_kills.OFTEN
            random_runs(Path(folder), arguments.runs, arguments.kills, arguments.parallel, often)


def random_runs(storage: Path, num_runs: int, num_kills: int, parallel: int, often: dict[str, int]) -> None:
    more = ("training.max_steps=60", "ray.max_failures=20", "ray.use_gpu=false")
    files = ("adapter/adapter_model.safetensors", "checkpoints/step_00000060/optimizer.safetensors")
    assert door.run(*settings(storage, "whole", *more)).returncode == 0

    def live(seed: int) -> tuple[random_kills.Story, bool]:
        run = storage / f"run-{seed}"
        story = random_kills.live(settings(storage, run.name, *more), run, num_kills, seed, 900, often)
        equal = story.exit_code == 0 and all(
            door.sha256(run / file) == door.sha256(storage / "whole" / file) for file in files
        )
        print(json.dumps({"seed": seed, "same_bits": equal, **vars(story)}), flush=True)
        return story, equal

    with ThreadPoolExecutor(parallel) as pool:
        stories = list(pool.map(live, range(num_runs)))
    kills, same = sum(len(story.kills) for story, _ in stories), sum(equal for _, equal in stories)
    seconds = [one for story, _ in stories for one in story.seconds_to_next_step]
    redone = [one for story, _ in stories for one in story.steps_redone]
    print(
        f"{kills} kills over {num_runs} runs, {same} with the bits of the undisturbed one; steps done again: at most "
        f"{max(redone)}; seconds to the next step: median {statistics.median(seconds):.1f}, "
        f"95th percentile {statistics.quantiles(seconds, n=20)[-1]:.1f}"
    )


def stuck(storage: Path, name: str, fault: str) -> str:
    """One run with the tests' deadlines (8 s a step, frozen after 10 s); `fault` is a kind of tests/chaos/inject."""
    if fault in ("sleep", "skip"):
        os.environ |= {"QLORA_RAY_FAULT": f"{fault}:1:{AT_STEP}", "QLORA_RAY_FAULT_MARKER": f"{storage}/{name}.once",
                       "PYTHONPATH": f"{Path(test_faults.__file__).parent / 'inject'}:{os.getcwd()}"}  # fmt: skip
    side = replace(_ours(storage), start=lambda name, resume: door.start(*settings(storage, name)))
    driver = side.start(name, False)
    os.environ.pop("QLORA_RAY_FAULT", None)
    door.wait_for_step(storage / name, AT_STEP, driver)
    if "SIGSTOP" in fault:
        _strike(random_kills.processes(driver), fault)
    struck = time.time()
    next_step = _next_step(side, name, driver, struck)
    driver.communicate(timeout=300)
    return f"next step after {next_step['time'] - struck:.1f} s" if next_step else f"not noticed in {LIMIT_SECONDS} s"


def control(storage: Path, parallel: int) -> None:
    sides = [_ours(storage), _stock(storage)]
    expected: dict[str, str | None] = {}
    print("| fault | " + " | ".join(side.name for side in sides) + " |\n|---|" + "---|" * len(sides))
    with ThreadPoolExecutor(parallel) as pool:
        for some in (FAULTS[:1], FAULTS[1:]):  # the undisturbed ones first: the others are compared with them
            cells = [
                [pool.submit(_outcome, side, f"run{FAULTS.index(fault)}", fault, expected) for side in sides]
                for fault in some
            ]
            for fault, row in zip(some, cells, strict=True):
                print(f"| {fault} | " + " | ".join(cell.result() for cell in row) + " |", flush=True)


def _outcome(side: Side, name: str, fault: str, expected: dict[str, str | None]) -> str:
    driver = side.start(name, False)
    tree: list = []
    try:
        if fault == "nothing":
            assert driver.wait(timeout=300) == 0, f"{side.name} does not get to its end"
            expected[side.name] = side.result(name)
            return f"{len(side.steps(name))} steps"
        while max((line["step"] for line in side.steps(name)), default=0) < AT_STEP:
            assert driver.poll() is None, f"{side.name} ends by itself: exit code {driver.returncode}"
            time.sleep(0.05)
        tree = random_kills.processes(driver)
        _strike(tree, fault)
        struck, reached = time.time(), max(line["step"] for line in side.steps(name))
        if "driver" in fault:
            driver.wait(timeout=60)
            random_kills.end(tree)
            if "bit" in fault:
                _flip_a_bit(side.newest_file(name))
            driver = side.start(name, True)
        next_step = _next_step(side, name, driver, struck)
        if next_step is None:
            return f"not noticed in {LIMIT_SECONDS} s" if driver.poll() is None else "the run ends; its steps are lost"
        driver.wait(timeout=300)
        result = side.result(name)
        seconds, redone = next_step["time"] - struck, max(0, reached - next_step["step"] + 1)
        bits = "same bits" if result == expected[side.name] else "other bits" if result else "the run fails"
        return f"{bits}, {redone} steps again, next step after {seconds:.0f} s"
    finally:
        random_kills.end([*random_kills.processes(driver), *tree])


def _strike(tree: list, fault: str) -> None:
    if "worker" in fault and "SIGSTOP" in fault:
        next(p for p in reversed(tree) if "ray::RayTrainWorker" in " ".join(p.cmdline())).send_signal(signal.SIGSTOP)
    elif "worker" in fault:
        assert random_kills.kill(tree, "worker")
    else:
        tree[0].kill()


def _next_step(side: Side, name: str, driver: subprocess.Popen, struck: float) -> dict | None:
    while driver.poll() is None and time.time() < struck + LIMIT_SECONDS:
        # A step that was under way may still be told.
        after = [line for line in side.steps(name) if line["time"] > struck + 1]
        if after:
            return after[0]
        time.sleep(0.1)
    return None


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _ours(storage: Path) -> Side:
    def start(name: str, resume: bool) -> subprocess.Popen:
        more = ["training.eval_every_steps=1000", "watchdog.frozen_seconds=20", "watchdog.min_seconds=20",
                "ray.use_gpu=false"]  # fmt: skip
        return door.start(*settings(storage, name, *more), *(["--resume"] if resume else []))

    def result(name: str) -> str | None:
        path = storage / name / "adapter" / "adapter_model.safetensors"
        return door.sha256(path) if path.exists() else None

    return Side(
        "qlora_ray",
        start,
        lambda name: [line for line in door.metrics(storage / name) if "loss" in line],
        result,
        lambda name: max((storage / name / "checkpoints").glob("step_*")) / "adapter.safetensors",
    )


def _stock(storage: Path) -> Side:
    def start(name: str, resume: bool) -> subprocess.Popen:
        command = [sys.executable, "-m", "benchmarks.stock_train", str(storage), f"stock-{name}", str(STEPS)]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ}
        )

    def steps(name: str) -> list[dict]:
        path = storage / f"stock-{name}.steps.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def result(name: str) -> str | None:
        path = storage / f"stock-{name}.sha256"
        return path.read_text() if path.exists() else None

    return Side(
        "Ray Train + DeepSpeed",
        start,
        steps,
        result,
        lambda name: max((storage / f"stock-{name}").glob("checkpoint_*/**/*optim_states.pt"), key=os.path.getmtime),
    )


if __name__ == "__main__":
    main()
