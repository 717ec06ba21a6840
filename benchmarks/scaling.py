r"""The ordinary path on 1, 2, 4 ... workers of one host: tokens per second of all, against one's in the same call.

    python -m benchmarks.scaling --shape llama-8b --workers 1 2 4
    python -m benchmarks.scaling --shape tiny --workers 1 2 --device cpu --rows 2 --length 128   # what CI has room for

    python -m benchmarks.scaling --workers 1 2 --sequence-parallel 2 --rows 1 --length 131072 --records 16 --layers 8 \
        --steps 6

Bytes are those that a GPU gets over NVLink, by the driver's counters, and what plan.json says.
Rows and length are those of a worker, so the work grows with the workers; with --sequence-parallel those of a group of
at most so many, which share each row. Writes JSON and prints a Markdown table.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.bases import save_checkpoint, save_four_bit
from benchmarks.links import Links
from benchmarks.product import STEPS, train
from benchmarks.records import save_rows
from benchmarks.shapes import SHAPES, floor_tokens_per_second, shape_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence-parallel", type=int, default=1, help="of the runs with as many workers or more")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run; the first fifth is not timed")
    parser.add_argument("--records", type=int, default=200, help="of full length, to make rows of")
    parser.add_argument("--four-bit", action="store_true", help="files that are in 4 bits already: for large shapes")
    parser.add_argument("--folder", default="/tmp/throughput_checkpoints")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="runs/scaling.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    save = save_four_bit if arguments.four_bit else save_checkpoint
    base = save(arguments.shape, arguments.folder, arguments.device, arguments.layers)
    data = save_rows(arguments.folder, arguments.length, arguments.records)
    floor = floor_tokens_per_second(shape_of(arguments.shape, arguments.layers), arguments.length)
    columns = "workers", "tokens/s", "against one", "of the floor", "peak GiB", "load s", "first step s"
    print(f"| {' | '.join(columns)} | GB a step, forecast |\n|{'---|' * 8}")
    results: list[dict] = []
    for count in arguments.workers:
        settings = [
            f"model.base_model={base}", f"training.max_length={arguments.length}", f"data.train_file={data}",
            f"training.batch_size={arguments.rows}", f"ray.num_workers={count}",
            f"training.sequence_parallel={min(count, arguments.sequence_parallel)}",
            f"ray.storage_path={Path(arguments.folder) / 'runs'}", f"ray.run_name=scaling_{count}_{time.time_ns()}",
        ]  # fmt: skip
        run = Path(*(setting.partition("=")[2] for setting in settings[-2:]))
        with Links(run) as links:
            measured = train([*settings, *arguments.overrides], arguments.steps)
        told = json.loads((run / "plan.json").read_text())["traffic"]
        forecast = sum(told.values()) if told else 0.0
        moved = links.bytes_a_step(count, max(1, arguments.steps // 5))
        made = {**vars(arguments), "workers": count, "bytes_a_step": moved, "bytes_forecast": told, **measured}
        results.append(made)
        rate = made["tokens_per_second"]
        against = rate / (results[0]["tokens_per_second"] / results[0]["workers"])
        print(f"| {count} | {rate:,.0f} | {against:.2f} | {rate / count / floor:.1%} | {made['peak_gib']:.2f} | "
              f"{made['seconds']['load']:.1f} | {made['seconds']['to_first_step']:.1f} | "
              f"{'-' if moved is None else f'{moved / 1e9:.2f}'}, {forecast / 1e9:.2f} |", flush=True)  # fmt: skip
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
