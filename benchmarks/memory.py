"""Forecast against measured peak memory, over models, lengths, batches, ranks, recomputation and ZeRO stages, on a GPU.

    python -m benchmarks.memory

Shapes are the real ones with four layers each, so that a case takes seconds. Writes JSON and prints a Markdown table.
"""

import argparse
import json
import os
from pathlib import Path

from benchmarks.throughput import SHAPES, build_base
from qlora_ray.config import Config
from qlora_ray.model.facts import BaseFacts
from qlora_ray.model.recompute import Choice, Keep, choose
from qlora_ray.planning import memory

LAYERS = 4
CASES = [  # shape, rows, length, rank, what is kept, ZeRO stage
    ("llama-8b", 4, 2048, 16, "all", 0), ("llama-8b", 4, 2048, 16, "all", 3), ("llama-8b", 4, 2048, 16, "host", 3),
    ("llama-8b", 1, 8192, 64, "products", 3), ("llama-8b", 2, 512, 8, "attention", 0),
    ("llama-8b", 4, 2048, 16, "weights", 3), ("llama-8b", 4, 2048, 16, "half", 3),
    ("mistral-7b", 4, 2048, 16, "all", 3),
    ("mistral-7b", 8, 1024, 32, "host", 3), ("mistral-7b", 1, 4096, 64, "input", 2),
    ("qwen2.5-7b", 4, 2048, 16, "all", 3), ("qwen2.5-7b", 4, 2048, 16, "host", 0),
    ("qwen2.5-7b", 2, 4096, 64, "half", 3), ("qwen2.5-7b", 1, 1024, 8, "products", 3),
]  # fmt: skip


def facts_of(shape: dict) -> BaseFacts:
    """What read_facts would find in a checkpoint of this shape."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    widths = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
              "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
              "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}  # fmt: skip
    linear = tuple((f"model.layers.{i}.{name}", *size) for i in range(layers) for name, size in widths.items())
    num_linear = sum(rows * columns for _, rows, columns in linear)
    return BaseFacts(
        model_type=shape["model_type"], num_parameters=num_linear + 2 * shape["vocab_size"] * hidden,
        num_linear_parameters=num_linear, num_layers=layers, hidden_size=hidden,
        vocab_size=shape["vocab_size"], linear_shapes=linear, context_length=8192, fingerprint="",
    )  # fmt: skip


def num_lora_parameters(facts: BaseFacts, rank: int) -> int:
    """Of A and B on every linear layer: r x (rows + columns) (LoRA, arXiv:2106.09685)."""
    return sum(rank * (rows + columns) for _, rows, columns in facts.linear_shapes)


def measure(name: str, rows: int, length: int, rank: int, kept: str, stage: int) -> dict:
    """Train three steps and compare peaks."""
    import torch

    from qlora_ray.model.adapter import add_adapter, trainable
    from qlora_ray.model.fused import fuse, keep
    from qlora_ray.planning import deepspeed
    from qlora_ray.worker.engine import Engine
    from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

    shape = {**SHAPES[name], "num_hidden_layers": LAYERS}
    config = Config.model_validate({"model": {"lora_r": rank}, "training": {"batch_size": rows}})
    facts = facts_of(shape)
    known = memory.sizes(config, facts, num_lora_parameters(facts, rank), stage, "bfloat16")
    if kept == "half":  # recompute: auto, with room for half of what keeping all takes
        leanest = sum(memory.memory_gib(known, rows * length, memory.all_layers(known, Keep.HOST)).values())
        whole = sum(memory.memory_gib(known, rows * length, memory.all_layers(known, Keep.ALL)).values())
        loaded = memory.memory_gib(known, rows * length, None)["while_loading"]
        budget = (leanest + whole) / 2 - loaded
        room = (budget - sum(memory.resident_gib(known).values())) * 2**30
        choice = choose(known.layer, LAYERS, rows * length, facts.vocab_size, room, may_hold=True)
    elif kept == "weights":
        choice = Choice((Keep.ALL,) * LAYERS, LAYERS)
    else:
        choice = memory.all_layers(known, Keep[kept.upper()])
    predicted = memory.peak_gib(memory.memory_gib(known, rows * length, choice))
    before = torch.cuda.memory_allocated()
    model = add_adapter(build_base(shape, "cuda"), config.model, torch.bfloat16, 0)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == known.num_trainable
    fuse(model)
    keep(model, choice)
    settings = deepspeed.defaults(config, stage, 1, "bfloat16", known.num_trainable)
    engine = Engine(model, config.training, settings)
    engine.train()
    torch.cuda.reset_peak_memory_stats()
    for seed in range(3):
        ids = torch.randint(3, shape["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids.cuda(), "labels": ids.cuda()}
        engine.backward(sum_of_nats(engine, batch) / num_label_tokens(batch))
        engine.add_up(1)
        engine.step(1e-4)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30  # DeepSpeed never lets go of an earlier case's model
    return {"shape": f"{name}, {LAYERS} layers", "rows": rows, "length": length, "rank": rank, "kept": str(choice),
            "stage": stage, "forecast_gib": predicted, "measured_gib": peak, "error": predicted / peak - 1}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/memory.json")
    arguments = parser.parse_args()
    import gc

    import torch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29532", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("nccl")
    results = []
    print("| shape | rows x length | rank | kept | stage | forecast GiB | measured GiB | error |\n" + "|---" * 8 + "|")
    for case in CASES:
        r = measure(*case)
        results.append(r)
        print(f"| {r['shape']} | {r['rows']} x {r['length']} | {r['rank']} | {r['kept']} | {r['stage']} | "
              f"{r['forecast_gib']:.2f} | {r['measured_gib']:.2f} | {r['error']:+.1%} |", flush=True)  # fmt: skip
        gc.collect()
        torch.cuda.empty_cache()
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
