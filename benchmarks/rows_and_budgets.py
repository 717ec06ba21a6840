"""Packed rows against rows of one sample, and `recompute: auto` within several budgets, in ZeRO stage 3 on one GPU.

    python -m benchmarks.rows_and_budgets --shape llama-8b --budgets 8 12 18 26 34 44 60

Random weights of a real shape. Packed rows hold samples of log-normal length, 300 to 340 tokens on average. Writes
JSON and prints two Markdown tables.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from benchmarks.bases import build_base
from benchmarks.memory import facts_of
from benchmarks.shapes import LEARNING_RATE, RANK, SEED, SHAPES

ROWS = ((4, 2048), (2, 4096), (1, 8192))  # rows x tokens: as many tokens each
MEAN_LOG_LENGTH, SPREAD_LOG_LENGTH = 5.6, 0.9  # of samples, in tokens


def build(shape: dict, device: str):
    """Engine, config and plan of a run with default settings."""
    import torch

    from qlora_ray.config import Config
    from qlora_ray.data.stats import DataStats
    from qlora_ray.model.adapter import add_adapter
    from qlora_ray.model.fused import fuse
    from qlora_ray.planning.hardware import Hardware
    from qlora_ray.planning.plan import make_plan
    from qlora_ray.worker.engine import Engine

    config = Config.model_validate(
        {"model": {"lora_r": RANK, "lora_alpha": RANK}, "training": {"batch_size": 4, "max_length": 2048},
         "ray": {"num_workers": 1}, "quantization": {"compute_dtype": "bfloat16"}}
    )  # fmt: skip
    data = DataStats("", 100, 0, 0, 100, 0, 100 * 2048, 100 * 2048, 2048)
    plan = make_plan(config, data, facts_of(shape), Hardware(8, 1 if device == "cuda" else 0), None)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    model = add_adapter(build_base(shape, device), config.model, torch.bfloat16, SEED)
    fuse(model)
    engine = Engine(model, config.training, plan.deepspeed)
    engine.train()
    return engine, config, plan


def rate(engine, batches: list[dict], steps: int) -> float:
    """Tokens per second: median of steps after two."""
    import torch

    from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

    device, seconds = batches[0]["input_ids"].device, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(steps + 2):
        batch, began = batches[number % len(batches)], time.perf_counter()
        engine.backward(sum_of_nats(engine, batch) / num_label_tokens(batch))
        engine.add_up(1)
        engine.step(LEARNING_RATE)
        seconds.append(time.perf_counter() - began)  # the step before must have ended: its gradient was looked at
    return batches[0]["input_ids"].numel() / statistics.median(seconds[2:])


def packed(rows: int, length: int, seed: int) -> tuple:
    """Positions and borders of samples of random lengths."""
    import torch

    random, lengths = torch.Generator().manual_seed(seed), []
    for _ in range(rows):
        left = length
        while left:
            drawn = (torch.randn(1, generator=random) * SPREAD_LOG_LENGTH + MEAN_LOG_LENGTH).exp()
            lengths.append(min(left, max(8, int(drawn))))
            left -= lengths[-1]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(rows, length)
    return positions, torch.tensor([0, *lengths]).cumsum(0).int()


def compare_rows(engine, shape: dict, device: str, steps: int) -> list[dict]:
    """Each kind of row in turn: of one sample, of several kept apart by borders, of several with transformers' mask."""
    import torch

    results = []
    for rows, length in ROWS:
        one, several, masked = [], [], []
        for seed in range(4):
            ids = torch.randint(3, shape["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
            one.append({"input_ids": ids.to(device), "labels": ids.to(device)})
            positions, borders = packed(rows, length, seed)
            masked.append({**one[-1], "position_ids": positions.to(device)})
            several.append({**masked[-1], "sample_borders": borders})
        results.append(
            {"rows": rows, "length": length, "samples": statistics.mean(len(b["sample_borders"]) - 1 for b in several),
             "one": rate(engine, one, steps), "packed": rate(engine, several, steps),
             "masked": rate(engine, masked, max(2, steps // 3))}
        )  # fmt: skip
    return results


def compare_budgets(engine, config, plan, shape: dict, budgets: list[float], device: str, steps: int) -> list[dict]:
    """Rising budgets: what is held dequantized stays held."""
    import torch

    from qlora_ray.model.fused import fused_layers
    from qlora_ray.worker.recomputation import keep_what_fits

    ids = [torch.randint(3, shape["vocab_size"], (4, 2048), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    batches, results = [{"input_ids": some.to(device), "labels": some.to(device)} for some in ids], []
    for budget in sorted(budgets):
        training = config.training.model_copy(update={"memory_budget_gib": budget})
        choice = keep_what_fits(
            engine.module, config.model_copy(update={"training": training}), plan, torch.device(device)
        )
        speed = rate(engine, batches, steps)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
        results.append({"budget_gib": budget, "peak_gib": peak, "tokens_per_second": speed, "choice": str(choice),
                        "layers": len(fused_layers(engine.module))})  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--budgets", nargs="*", type=float, default=[8, 12, 18, 26, 34, 44, 60])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="runs/rows_and_budgets.json")
    arguments = parser.parse_args()
    import torch

    shape = SHAPES[arguments.shape]
    engine, config, plan = build(shape, arguments.device)
    budgets = compare_budgets(engine, config, plan, shape, arguments.budgets, arguments.device, arguments.steps)
    print("| budget GiB | peak GiB | tokens/s | kept |\n" + "|---" * 4 + "|")
    for r in budgets:
        print(f"| {r['budget_gib']:g} | {r['peak_gib']:.2f} | {r['tokens_per_second']:,.0f} | {r['choice']} |")
    rows = compare_rows(engine, shape, arguments.device, arguments.steps)
    print("| rows x length | samples | one sample a row | packed | with a mask | packed / one |\n" + "|---" * 6 + "|")
    for r in rows:
        print(f"| {r['rows']} x {r['length']} | {r['samples']:.0f} | {r['one']:,.0f} | {r['packed']:,.0f} | "
              f"{r['masked']:,.0f} | {r['packed'] / r['one']:.2f} |")  # fmt: skip
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps({"budgets": budgets, "rows": rows}, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
