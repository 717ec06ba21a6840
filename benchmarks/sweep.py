"""What a sweep saves and what it costs: python -m benchmarks.sweep [fifo] [asha] [overhead].

fifo, asha: eight learning rates and two ranks on the embedded base, all trials to their end, or as ASHA decides: is the
same best learning rate found, in which share of the steps? What ASHA saves depends on the order in which it meets them.
overhead: the same run alone and as a trial, on one warm cluster: seconds a trial.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
RANKS = [8, 16]
SMALL = ["evaluation.num_prompts=0", "evaluation.num_samples=0", "checkpoint.every_steps=20", "logging.every_steps=5"]
STEPS = 60


def timed(door: str, storage: Path, name: str, *more: str) -> tuple[dict, float]:
    """Run a door; returns its summary and the wall seconds of the whole process."""
    command = [sys.executable, "-m", f"qlora_ray.{door}", "-c", "configs/sweep.yaml", *SMALL]
    began = time.perf_counter()
    ended = subprocess.run(
        [*command, f"ray.storage_path={storage}", f"ray.run_name={name}", *more], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((storage / name / "summary.json").read_text()), time.perf_counter() - began


def grid(rates: list[float], ranks: list[int], scheduler: str) -> list[str]:
    parameters = json.dumps({"training.learning_rate": {"grid": rates}, "model.lora_r": {"grid": ranks}})
    of_all = ["sweep.search=grid", "sweep.num_trials=null", f"sweep.scheduler={scheduler}"]
    return [f"sweep.parameters={parameters}", *of_all]


def find_best(storage: Path, scheduler: str) -> None:
    common = [f"training.max_steps={STEPS}", "training.eval_every_steps=5"]
    summary, seconds = timed("tune", storage, scheduler, *grid(RATES, RANKS, scheduler), *common)
    best, steps, whole = summary["best"], summary["steps"], len(RATES) * len(RANKS) * STEPS
    rate = best["parameters"]["training.learning_rate"]
    print(
        f"{scheduler}: best learning rate {rate:g}, eval_loss {best['value']:.5f}; "
        f"{steps:,} steps, {steps / whole:.0%} of the grid's {whole:,}; {seconds:.0f} s",
        flush=True,
    )


def measure_overhead(storage: Path) -> None:
    import os

    import ray

    ray.init(num_cpus=len(os.sched_getaffinity(0)) + 1, include_dashboard=False, logging_level="ERROR")
    address = ray.get_runtime_context().gcs_address
    common = [f"ray.address={address}", "training.max_steps=10", "training.eval_every_steps=10"]
    one_at_a_time = [*common, "sweep.max_concurrent_trials=1"]
    timed("train", storage, "warm", "sweep=null", *common)  # fills caches
    for i in range(2):
        alone = timed(
            "train", storage, f"alone{i}", "sweep=null", "training.learning_rate=0.001", "model.lora_r=8", *common
        )[1]
        one = timed("tune", storage, f"one{i}", *grid(RATES[4:5], RANKS[:1], "fifo"), *one_at_a_time)[1]
        three = timed("tune", storage, f"three{i}", *grid(RATES[3:6], RANKS[:1], "fifo"), *one_at_a_time)[1]
        each = (three - one) / 2
        print(
            f"run alone {alone:.1f} s; a trial more in a sweep {each:.1f} s: {each - alone:+.1f} s a trial; "
            f"the sweep itself {one - each:.1f} s, once",
            flush=True,
        )
    ray.shutdown()


def main() -> None:
    parts = sys.argv[1:] or ["fifo", "asha", "overhead"]
    with tempfile.TemporaryDirectory() as storage:
        for part in parts:
            if part == "overhead":
                measure_overhead(Path(storage))
            else:
                find_best(Path(storage), part)


if __name__ == "__main__":
    main()
