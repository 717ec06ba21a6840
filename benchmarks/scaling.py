"""The ordinary path on 1, 2, 4 ... workers of one host: tokens per second of all, against one's in the same call.

    python -m benchmarks.scaling --shape llama-8b --workers 1 2 4
    python -m benchmarks.scaling --shape tiny --workers 1 2 --device cpu --rows 2 --length 128   # what CI has room for

Rows and length are those of a worker, so the work grows with the workers. Writes JSON and prints a Markdown table.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.product import train
from benchmarks.throughput import SHAPES, floor_tokens_per_second, save_checkpoint, save_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--folder", default="/tmp/throughput_checkpoints")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="runs/scaling.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    base = save_checkpoint(arguments.shape, arguments.folder, arguments.device)
    data = save_rows(arguments.folder, arguments.length)
    floor = floor_tokens_per_second(SHAPES[arguments.shape], arguments.length)
    print("| workers | tokens/s | against one | of the floor | peak GiB | load s | first step s |\n" + "|---" * 7 + "|")
    results: list[dict] = []
    for count in arguments.workers:
        settings = [
            f"model.base_model={base}", f"training.max_length={arguments.length}", f"data.train_file={data}",
            f"training.batch_size={arguments.rows}", f"ray.num_workers={count}",
            f"ray.storage_path={Path(arguments.folder) / 'runs'}", f"ray.run_name=scaling_{count}_{time.time_ns()}",
        ]  # fmt: skip
        made = {"workers": count, "shape": arguments.shape, **train([*settings, *arguments.overrides])}
        results.append(made)
        rate = made["tokens_per_second"]
        against = rate / (results[0]["tokens_per_second"] / results[0]["workers"])
        print(f"| {count} | {rate:,.0f} | {against:.2f} | {rate / count / floor:.1%} | {made['peak_gib']:.2f} | "
              f"{made['seconds']['load']:.1f} | {made['seconds']['to_first_step']:.1f} |", flush=True)  # fmt: skip
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
