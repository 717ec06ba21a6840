"""Forecast against measured peak memory, over models, lengths, batches, ranks, recomputation and ZeRO stages, on a GPU.

    python -m benchmarks.memory

Shapes are the real ones with four layers each, so that a case takes seconds. Writes JSON and prints a Markdown table.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.bases import build_base
from benchmarks.shapes import SHAPES
from qlora_ray.config import Config
from qlora_ray.model.facts import BaseFacts
from qlora_ray.model.recompute import Choice, Keep, Room, choose
from qlora_ray.planning import memory

LAYERS = 4
NEWER = ("qwen3-8b", "gemma3-4b", "phi-4-mini", "granite-3-8b", "olmo2-7b", "smollm3-3b", "glm4-9b", "gpt2-medium")
MIXTURES = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b")
CASES = [  # shape, rows, length, rank, what is kept, ZeRO stage
    ("llama-8b", 4, 2048, 16, "all", 0), ("llama-8b", 4, 2048, 16, "all", 3), ("llama-8b", 4, 2048, 16, "host", 3),
    ("llama-8b", 1, 8192, 64, "products", 3), ("llama-8b", 2, 512, 8, "attention", 0),
    ("llama-8b", 4, 2048, 16, "weights", 3), ("llama-8b", 4, 2048, 16, "half", 3),
    ("mistral-7b", 4, 2048, 16, "all", 3),
    ("mistral-7b", 8, 1024, 32, "host", 3), ("mistral-7b", 1, 4096, 64, "input", 2),
    ("qwen2.5-7b", 4, 2048, 16, "all", 3), ("qwen2.5-7b", 4, 2048, 16, "host", 0),
    ("qwen2.5-7b", 2, 4096, 64, "half", 3), ("qwen2.5-7b", 1, 1024, 8, "products", 3),
    *((shape, 4, 2048, 16, kept, 3) for shape in NEWER for kept in ("all", "half", "host")),
    *((shape, 1, 4096, 64, "attention", 0) for shape in NEWER), *((shape, 2, 1024, 8, "weights", 3) for shape in NEWER),
    *((shape, *size, 16, kept, 3) for shape in MIXTURES for size in ((4, 2048), (2, 2048)) for kept in ("host", "all")),
]  # fmt: skip


def facts_of(shape: dict) -> BaseFacts:
    """What read_facts would find in a checkpoint of this shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from qlora_ray.model.experts import expert_sizes

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(max_position_embeddings=8192, tie_word_embeddings=False, **shape)
        )
    kinds = (torch.nn.Linear, Conv1D)
    layers = {name: module for name, module in model.base_model.named_modules() if isinstance(module, kinds)}
    linear = tuple((f"model.{name}", *module.weight.shape) for name, module in layers.items())
    return BaseFacts(
        model_type=shape["model_type"], num_parameters=sum(one.numel() for one in model.parameters()),
        num_linear_parameters=sum(rows * columns for _, rows, columns in linear),
        num_layers=shape["num_hidden_layers"], hidden_size=shape["hidden_size"], vocab_size=shape["vocab_size"],
        linear_shapes=linear, context_length=8192, fingerprint="",
        experts=expert_sizes(model, are_packed=True),
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
    known = memory.sizes(config, facts, num_lora_parameters(facts, rank), stage, "bfloat16").of_rows(length)
    if kept == "half":  # recompute: auto, with room for half of what keeping all takes
        leanest = sum(memory.memory_gib(known, rows * length, memory.all_layers(known, Keep.HOST)).values())
        whole = sum(memory.memory_gib(known, rows * length, memory.all_layers(known, Keep.ALL)).values())
        loaded = memory.loading_gib(known)
        budget = (leanest + whole) / 2 - loaded
        room = (budget - sum(memory.resident_gib(known).values())) * 2**30
        choice = choose(known.layer, LAYERS, rows * length, facts.vocab_size, Room(room, may_hold_weights=True))
    elif kept == "weights":
        choice = Choice((Keep.ALL,) * LAYERS, LAYERS)
    else:
        choice = memory.all_layers(known, Keep[kept.upper()])
    predicted = memory.peak_gib(memory.memory_gib(known, rows * length, choice))
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
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"shape": f"{name}, {LAYERS} layers", "rows": rows, "length": length, "rank": rank, "kept": str(choice),
            "stage": stage, "forecast_gib": predicted, "measured_gib": peak, "error": predicted / peak - 1}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/memory.json")
    parser.add_argument("--first", type=int, default=0, help="begin with this case")
    parser.add_argument("--cases", nargs="+", type=int, help="these cases alone, by their places in CASES")
    parser.add_argument("--at-once", type=int, default=1, help="processes that share the GPU: each counts its own")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        _measure_alone(arguments.one)
        return
    numbers = arguments.cases or list(range(arguments.first, len(CASES)))
    print("| shape | rows x length | rank | kept | stage | forecast GiB | measured GiB | error |\n" + "|---" * 8 + "|")
    with ThreadPoolExecutor(arguments.at_once) as threads:
        results = [result for result in threads.map(_measure_apart, numbers) if result]
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))


def _measure_apart(number: int) -> dict | None:
    """In a process of its own: DeepSpeed never lets go of a model."""
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--one", str(number)], capture_output=True, text=True
    )
    found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"{CASES[number]}: failed\n{ran.stderr[-1500:]}", file=sys.stderr)
        return None
    r = json.loads(found[0].removeprefix("RESULT "))
    print(f"| {r['shape']} | {r['rows']} x {r['length']} | {r['rank']} | {r['kept']} | {r['stage']} | "
          f"{r['forecast_gib']:.2f} | {r['measured_gib']:.2f} | {r['error']:+.1%} |", flush=True)  # fmt: skip
    return r


def _measure_alone(number: int) -> None:
    import torch

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29532 + number), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    torch.distributed.init_process_group("nccl")
    print("RESULT " + json.dumps(measure(*CASES[number])))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
