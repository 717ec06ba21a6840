"""The ordinary path, `python -m qlora_ray.train`, timed on a random model of a real shape: Ray Train, ZeRO stage 3.

    python -m benchmarks.product --shape llama-8b -- training.memory_budget_gib=8.05
    python -m benchmarks.product --shape llama-8b --chats -- training.packing=true data.train_on=everything

Writes a 16-bit checkpoint of random weights once (35 s for 8B), then trains on rows of full length; prints JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.bases import save_checkpoint
from benchmarks.records import save_chats, save_rows
from benchmarks.shapes import SHAPES, floor_tokens_per_second, shape_of

STEPS = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="as many of the shape's; else all")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--folder", default="/tmp/throughput_checkpoints")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--chats", action="store_true", help="packed chats of log-normal lengths, a third labelled")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    base = save_checkpoint(arguments.shape, arguments.folder, arguments.device, arguments.layers)
    data = save_chats(arguments.folder) if arguments.chats else save_rows(arguments.folder, arguments.length)
    settings = [
        f"model.base_model={base}", f"training.max_length={arguments.length}", f"training.batch_size={arguments.rows}",
        f"data.train_file={data}", f"ray.storage_path={Path(arguments.folder) / 'runs'}",
        f"ray.run_name={arguments.shape}_{time.time_ns()}",
    ]  # fmt: skip
    measured = train([*settings, *arguments.overrides], arguments.steps)
    floor = floor_tokens_per_second(shape_of(arguments.shape, arguments.layers), arguments.length)
    print(json.dumps({
        "shape": arguments.shape, "layers": arguments.layers, "overrides": arguments.overrides,
        "floor_share": measured["tokens_per_second"] / floor, **measured,
    }, indent=1))  # fmt: skip


def train(settings: list[str], num_steps: int = STEPS) -> dict:
    """What a run with these settings measured of itself after a fifth of its steps. Ends the process where it fails."""
    began, every = time.perf_counter(), max(1, num_steps // 5)
    fixed = [
        "model.lora_dropout=0", "ray.num_workers=1", f"training.max_steps={num_steps}", "data.validation_split=0",
        "data.max_bad_fraction=1", "evaluation.num_prompts=0", f"logging.every_steps={every}",
        f"checkpoint.every_steps={num_steps}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "qlora_ray.train", "-c", "configs/quickstart.yaml", *fixed, *settings]
    ran = subprocess.run(command, capture_output=True, text=True)
    given = dict(setting.split("=", 1) for setting in settings)
    run = Path(given["ray.storage_path"]) / given["ray.run_name"]
    log = run / "logs" / "worker_0.log"
    if ran.returncode or not (run / "summary.json").exists():
        print(ran.stdout[-1500:], ran.stderr[-1500:], log.read_text()[-4000:] if log.exists() else "", file=sys.stderr)
        sys.exit(ran.returncode or 1)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [entry for entry in metrics if "loss" in entry]
    steady = [entry for entry in metrics if entry["step"] > every] or metrics  # or the only one
    said = [line for line in log.read_text().splitlines() if "qlora_ray" in line and " INFO " in line]
    return {
        "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in steady),
        "samples_per_second": statistics.median(entry["samples_per_second"] for entry in steady),
        "peak_gib": max(entry.get("peak_memory_gib", 0) for entry in metrics), "log": said,
        "phases": {name: value for name, value in metrics[-1].items() if name.endswith("_seconds")},
        "forecast_gib": json.loads((run / "plan.json").read_text())["memory_forecast_gib"],
        "seconds": json.loads((run / "summary.json").read_text())["seconds"],
        "wall_seconds": time.perf_counter() - began,
        "steps": [(entry["step"], round(entry["tokens_per_second"]), round(entry["loss"], 4)) for entry in metrics],
    }  # fmt: skip


if __name__ == "__main__":
    main()
