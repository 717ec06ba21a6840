"""Whether a GPU gives the same bits twice, after kills, and with another number of workers; and what that costs.

    python -m benchmarks.same_bits [--layers 4] [--workers 2 --compare again killed shared]
    python -m benchmarks.same_bits --only deterministic --shape tiny --device cpu --workers 8 --compare killed shared

Trains a few layers of a real shape (random weights) through `python -m qlora_ray.train`, with and without
training.deterministic: twice undisturbed by one worker, and by --workers workers with the same global batch, once
undisturbed ("shared") and once with three of them killed. Prints JSON lines and a Markdown table.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.bases import save_checkpoint
from benchmarks.records import save_rows
from benchmarks.shapes import SHAPES
from tests.chaos import random_kills
from tests.integration import door

STEPS, KILL_AT = 24, (6, 12, 18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each row, all of one sample")
    parser.add_argument("--only", choices=["fast", "deterministic"])
    parser.add_argument("--compare", nargs="+", choices=["again", "killed", "shared"], default=["again", "killed"])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    shape = f"{arguments.shape}-{arguments.layers}"
    SHAPES[shape] = SHAPES[arguments.shape] | {"num_hidden_layers": arguments.layers}
    with tempfile.TemporaryDirectory() as folder:
        base = save_checkpoint(shape, folder, arguments.device)
        common = [f"model.base_model={base}", f"training.max_length={arguments.length}",
                  f"data.train_file={save_rows(folder, arguments.length)}"]  # fmt: skip
        rows = []
        for kind in ("fast", "deterministic"):
            if arguments.only in (None, kind):
                rows.append(_kind(Path(folder), common, kind, arguments.workers, arguments.compare))
    print("| kernels | same bits twice | after three kills | with other workers | tokens/s |\n|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def _kind(folder: Path, common: list[str], kind: str, workers: int, compare: list[str]) -> tuple:
    def settings(name: str, num_workers: int) -> list[str]:
        return [
            "-c", "configs/quickstart.yaml", *common, "model.lora_dropout=0", "data.validation_split=0",
            f"ray.storage_path={folder}", f"ray.run_name={kind}-{name}", f"ray.num_workers={num_workers}",
            "training.batch_size=2", f"training.max_steps={STEPS}",
            f"training.gradient_accumulation_steps={2 * workers // num_workers}", "data.max_bad_fraction=1",
            "logging.every_steps=1", "checkpoint.every_steps=5",
            "evaluation.num_prompts=0", "ray.max_failures=9", f"training.deterministic={kind == 'deterministic'}",
        ]  # fmt: skip

    def whole(name: str, num_workers: int = 1) -> str:
        ended = door.run(*settings(name, num_workers), timeout=200)
        assert ended.returncode == 0, ended.stderr[-2000:]
        return _digest(folder / f"{kind}-{name}")

    def killed() -> str:
        run = folder / f"{kind}-killed"
        driver = door.start(*settings("killed", workers))
        for step in KILL_AT:
            door.wait_for_step(run, step, driver)
            random_kills.kill(random_kills.processes(driver), "worker")
        _, words = driver.communicate(timeout=200)
        assert driver.returncode == 0, words[-2000:]
        return _digest(run)

    first = whole("first")
    ways = {"again": lambda: whole("again"), "killed": killed, "shared": lambda: whole("shared", workers)}
    same = [ways[way]() == first if way in compare else "-" for way in ways]
    speed = statistics.median(
        line["tokens_per_second"] for line in door.metrics(folder / f"{kind}-first")[10:] if "loss" in line
    )
    print(json.dumps([kind, same, round(speed), door.losses(folder / f"{kind}-first")[STEPS]]), flush=True)
    return (kind, *same, round(speed))


def _digest(run: Path) -> str:
    files = ("adapter/adapter_model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors")
    return hashlib.sha256(b"".join((run / file).read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    main()
