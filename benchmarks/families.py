"""Each family's share of its floor, against Llama's, from a few of its layers on one GPU.

    python -m benchmarks.families --shapes smollm3-3b olmo2-7b phi-4-mini granite-3-8b glm4-9b

A shape runs with FEW and with twice as many layers, nothing recomputed, as `throughput --variants ours:all` runs it.
The difference is what layers take; the whole model is the first run and that for each further layer. One process.
"""

import argparse
import gc
import json
import statistics

from benchmarks.shapes import SHAPES, floor_tokens_per_second, shape_of
from benchmarks.variants import ours

FEW, WARMUP = 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["smollm3-3b"], choices=SHAPES)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--keep", nargs="+", default=["all"])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    arguments.variant = "ours"
    against = 0.0
    for name in ["llama-8b", *(shape for shape in arguments.shapes if shape != "llama-8b")]:
        found = measure(name, arguments)
        against = against or found["floor_share"]
        print(json.dumps({**found, "of_llamas_share": round(found["floor_share"] / against, 4)}), flush=True)


def measure(name: str, arguments: argparse.Namespace) -> dict:
    """Of a whole model and of a layer: tokens per second, and share of the floor."""
    few, twice = (seconds_of_a_step(name, count, arguments) for count in (FEW, 2 * FEW))
    layer, tokens = (twice - few) / FEW, arguments.batch_size * arguments.length
    floors = [floor_tokens_per_second(shape_of(name, count), arguments.length) for count in (FEW, 2 * FEW)]
    layer_floor = tokens * (1 / floors[1] - 1 / floors[0]) / FEW
    num_layers = SHAPES[name]["num_hidden_layers"]
    speed = tokens / (few + (num_layers - FEW) * layer)
    return {
        "shape": name, "tokens_per_second": round(speed),
        "floor_share": round(speed / floor_tokens_per_second(SHAPES[name], arguments.length), 4),
        "layer_ms": round(1000 * layer, 3), "layer_share": round(layer_floor / layer, 4),
        "few_ms": round(1000 * few, 2), "few_share": round(tokens / few / floors[0], 4),
    }  # fmt: skip


def seconds_of_a_step(name: str, num_layers: int, arguments: argparse.Namespace) -> float:
    """Median of a model of so many layers."""
    import torch

    shape = shape_of(name, num_layers)
    step, _ = ours(arguments, shape)
    ids = torch.randint(3, shape["vocab_size"], (arguments.batch_size, arguments.length), device=arguments.device)
    marks = []
    for _ in range(WARMUP + arguments.steps + 1):
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        step({"input_ids": ids, "labels": ids}, lambda _: None)
    torch.cuda.synchronize()
    del step
    gc.collect()
    torch.cuda.empty_cache()
    pairs = zip(marks[WARMUP:], marks[WARMUP + 1 :], strict=False)
    return statistics.median(before.elapsed_time(after) / 1000 for before, after in pairs)


if __name__ == "__main__":
    main()
