"""Seconds until --help, a config error, a plan, the first optimizer step: python -m benchmarks.startup [repetitions].

Also of the look at a node that a run takes before it starts (cluster/quick.py), once Ray has imported what it needs.

Medians of whole processes, caches warm, on whatever else the machine is doing: run it on an idle one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = [sys.executable, "-m", "qlora_ray.train"]
PLAN = [sys.executable, "-m", "qlora_ray.plan", "model.base_model=embedded"]


def seconds_of(command: list[str], code: int) -> float:
    began = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    return time.perf_counter() - began


def seconds_to_first_step(storage: str, name: str) -> float:
    short = ["training.max_steps=2", "evaluation.num_prompts=0", "training.eval_every_steps=2"]
    seconds_of([*TRAIN, f"ray.storage_path={storage}", f"ray.run_name={name}", *short], 0)
    return json.loads(Path(storage, name, "summary.json").read_text())["seconds"]["to_first_step"]


def seconds_of_quick_look() -> float:
    from qlora_ray.cluster import node_facts
    from qlora_ray.cluster.checks import QUICK
    from qlora_ray.cluster.found import Found, look
    from qlora_ray.cluster.needs import needs_of
    from qlora_ray.config import Config, ModelConfig
    from qlora_ray.planning.hardware import Hardware

    question = node_facts.Question(ModelConfig(), None, ".probe", "127.0.0.1", ask_hub=False)
    node_facts.gather(question)
    began = time.perf_counter()
    here = node_facts.gather(question)
    look(Found(here, {"here": here}, needs_of(Config(), Hardware(2, 0), None)), QUICK)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repetitions", nargs="?", type=int, default=3)
    repetitions = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory() as storage:
        seconds_to_first_step(storage, "warm")  # fills the data cache and the page cache
        figures = {
            "--help": [seconds_of([*TRAIN, "--help"], 0) for _ in range(repetitions)],
            "config error": [seconds_of([*TRAIN, "training.lerning_rate=1"], 2) for _ in range(repetitions)],
            "a plan (python -m qlora_ray.plan)": [seconds_of(PLAN, 0) for _ in range(repetitions)],
            "the quick look at a node": [seconds_of_quick_look() for _ in range(repetitions)],
            "first optimizer step (quickstart)": [
                seconds_to_first_step(storage, f"run{i}") for i in range(repetitions)
            ],
        }
    print("| until | seconds (median) | all |\n|---|---|---|")
    for what, seconds in figures.items():
        print(f"| {what} | {statistics.median(seconds):.2f} | {', '.join(f'{s:.2f}' for s in seconds)} |")


if __name__ == "__main__":
    main()
