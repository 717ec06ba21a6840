"""Whether a run whose nodes go and come ends with the bits of one that kept all its workers.

    python -m benchmarks.elastic --workers 4                              # on 4 GPUs: 4, 2, 4 workers
    python -m benchmarks.elastic --workers 8 --shape tiny --device cpu    # with gloo ranks: 8, 4, 8

Two nodes of this host hold half of the workers each, as Ray sees them. One is killed, the run goes on with half, a new
one takes its place, and the run grows again. training.deterministic; a few layers of a real shape. Prints JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bases import save_checkpoint
from benchmarks.records import save_rows
from benchmarks.shapes import SHAPES
from tests.chaos import nodes
from tests.integration import door

FILES = "adapter/adapter_model.safetensors", "checkpoints/step_{:08d}/optimizer.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    with tempfile.TemporaryDirectory() as folder:
        told = measure(Path(folder), arguments)
    print(json.dumps(told))
    sys.exit(not told["same_bits"])


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    """Both runs, and what the second one met."""
    half, is_cuda = arguments.workers // 2, arguments.device == "cuda"
    base = save_checkpoint(arguments.shape, str(folder), arguments.device, arguments.layers)
    settings = [
        "-c", "configs/quickstart.yaml", f"model.base_model={base}", f"training.max_length={arguments.length}",
        f"data.train_file={save_rows(str(folder), arguments.length)}", "model.lora_dropout=0",
        "data.validation_split=0", "data.max_bad_fraction=1", f"ray.storage_path={folder}", "training.batch_size=2",
        "training.gradient_accumulation_steps=1", f"ray.num_workers=[{half},{arguments.workers}]",
        f"training.max_steps={arguments.steps}", "training.deterministic=true", "logging.every_steps=1",
        "checkpoint.every_steps=20", "evaluation.num_prompts=0", "ray.max_failures=9",
        "ray.elastic_resize_monitor_interval_s=3",
    ]  # fmt: skip
    ended = door.run(*settings, "ray.run_name=whole", timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    whole, run = folder / "whole", folder / "elastic"
    with nodes.cluster(0) as cluster:
        halves = [_add(cluster, number * half, half, is_cuda) for number in (0, 1)]
        driver = door.start(
            *settings, "ray.run_name=elastic", f"ray.address={cluster.address}", "ray.allow_unauthenticated=true",
            f"ray.resources_per_worker={nodes.SLOT}",
        )  # fmt: skip
        door.wait_for_step(run, 10, driver)
        cluster.remove_node(halves[1], allow_graceful=False)
        _wait_for_workers(run, half, driver)
        _add(cluster, half, half, is_cuda)
        _wait_for_workers(run, arguments.workers, driver)
        out, words = driver.communicate(timeout=300)
    assert driver.returncode == 0, (out + words)[-3000:]
    files = [file.format(arguments.steps) for file in FILES]
    counts = [line["num_workers"] for line in door.metrics(run) if "num_workers" in line]
    changes = [count for count, before in zip(counts, [None, *counts], strict=False) if count != before]
    return {
        "workers": changes, "same_bits": all(door.sha256(run / file) == door.sha256(whole / file) for file in files),
        "same_losses": door.losses(run) == door.losses(whole), "sha256": door.sha256(run / files[0])[:16],
        "steps_redone": [one["steps_redone"] for one in door.summary(run)["failures"]],
    }  # fmt: skip


def _add(cluster, first: int, count: int, is_cuda: bool):
    """A node of so many workers; on GPUs those from `first` on."""
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(str(first + place) for place in range(count))} if is_cuda else {}
    return nodes.add(cluster, slots=count, num_gpus=count * is_cuda, env_vars=visible)


def _wait_for_workers(run: Path, number: int, driver) -> None:
    def are_there() -> bool:
        return [line["num_workers"] for line in door.metrics(run) if "num_workers" in line][-1:] == [number]

    began = time.monotonic()
    door.wait_for(are_there, driver, f"step of {number} workers", timeout=200)
    print(f"{number} workers after {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
