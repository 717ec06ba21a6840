r"""What a step costs from 1 to 512 GPUs, by a model of it: docs/scaling.md. Measured: benchmarks/scaling.py.

    python -m benchmarks.scaling_model --shapes llama-8b llama-70b

A worker's products take what the plan says. Beside them: the base's layers, gathered twice a micro-batch where workers
share it, each behind the products of a layer; the gradient's sum, once a micro-batch (all-to-all), and handed out once
a step, with the weights (all-gathers); a word among the workers. Rings: (N - 1) hops and (N - 1) / N of the bytes.
"""

import argparse
from dataclasses import dataclass

from benchmarks.shapes import RANK, SHAPES, floor_tokens_per_second
from qlora_ray.planning.memory import BYTES_PER_WEIGHT, SHARE_OF_FLOOR

GPUS_OF_A_NODE = 8
# Bytes a second of a GPU, and seconds of a hop. NVLink: 450 GB/s by the data sheet of the H100, 0.75 of it reached;
# between nodes: 400 Gb/s InfiniBand a GPU, 0.8 of it reached. Hops: NCCL's order of magnitude; both are assumptions.
INSIDE, BETWEEN = (340e9, 5e-6), (40e9, 15e-6)
WORD = 2e-4  # of a message over TCP among the workers' hosts, each doubling of their number


@dataclass(frozen=True)
class Step:
    """Seconds of one, by part."""

    products: float
    waited_for_base: float
    sums: float
    words: float

    @property
    def total(self) -> float:
        return self.products + self.waited_for_base + self.sums + self.words


def step_of(shape: dict, num_gpus: int, *, tokens: int, length: int, shares_base: bool) -> Step:
    """One micro-batch of so many tokens a GPU, one micro-batch a step."""
    layers, hidden, inner = shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sides = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), *[(hidden, inner)] * 3]
    trained = layers * sum(RANK * (a + b) for a, b in sides)
    products = tokens / (SHARE_OF_FLOOR * floor_tokens_per_second(shape, length))
    if num_gpus == 1:
        return Step(products, 0.0, 0.0, 0.0)
    bandwidth, hop = INSIDE if num_gpus <= GPUS_OF_A_NODE else BETWEEN

    def moved(num_bytes: float) -> float:
        return (num_gpus - 1) * hop + num_bytes * (num_gpus - 1) / num_gpus / bandwidth

    layer_bytes = sum(a * b for a, b in sides) * BYTES_PER_WEIGHT[True]
    forward, backward = products / layers / 3, products / layers * 2 / 3
    waited = layers * sum(max(0.0, moved(layer_bytes) - hidden_by) for hidden_by in (forward, backward))
    sums = moved(2 * trained) + moved(4 * trained) + moved(2 * trained)
    return Step(products, waited if shares_base else 0.0, sums, WORD * (num_gpus - 1).bit_length())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-8b", "llama-70b"], choices=SHAPES)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 8, 16, 64, 256, 512])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    arguments = parser.parse_args()
    print("| shape | base | GPUs | products ms | waiting for the base | sums | words | of N times one GPU |")
    print("|---" * 8 + "|")
    for name in arguments.shapes:
        for shares_base in (False, True):
            for count in arguments.gpus[1:] if shares_base else arguments.gpus:
                made = step_of(
                    SHAPES[name], count, tokens=arguments.rows * arguments.length, length=arguments.length,
                    shares_base=shares_base,
                )  # fmt: skip
                parts = (made.products, made.waited_for_base, made.sums, made.words)
                shown = " | ".join(f"{1000 * seconds:,.1f}" for seconds in parts)
                print(f"| {name} | {'world' if shares_base else 'replicate'} | {count} | {shown} | "
                      f"{made.products / made.total:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
