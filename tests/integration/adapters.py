"""Small trained adapters, made in this process by a plain loop and written as a worker writes them."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import torch

from qlora_ray.data.stats import DataStats
from qlora_ray.data.tokenize import load_tokenizer
from qlora_ray.inference.judge import Examples
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import load_base
from qlora_ray.model.routed import compute_in_4_bits
from qlora_ray.storage import open_folder
from qlora_ray.worker.export import about, in_dtype, write_adapter
from qlora_ray.worker.messages import Run
from tests.integration import tiny_models

NUM_PROMPT_TOKENS = 8  # of the 24 of a row of tiny_models.batch


def trained(folder: Path, base: str, dtype: str = "float32", steps: int = 40, **model) -> Path:
    """Train a LoRA on two random rows until it knows them; returns the adapter's folder, inside a run directory."""
    config = tiny_models.make_config(base, model=model)
    compute_dtype = getattr(torch, dtype)
    base_model = load_base(config.model, config.quantization, dtype, torch.device("cpu"))
    adapted = add_adapter(base_model, config.model, compute_dtype, 0)
    compute_in_4_bits(adapted)
    parameters = trainable(adapted)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    adapted.train()
    for _ in range(steps):
        adapted(**tiny_models.batch(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run = open_folder(str(folder))
    stats = DataStats("0" * 32, 2, 0, 0, 2, 0, 48, 32, 24)
    manifest = {"data": dataclasses.asdict(stats), "versions": {"qlora_ray": "0"}, "git_commit": None}
    (run / "manifest.json").write_bytes(json.dumps(manifest).encode())
    plan: Any = SimpleNamespace(compute_dtype=dtype, num_workers=1)
    tokenizer = load_tokenizer(base, None)
    weights = {name: parameter.detach().float() for name, parameter in parameters.items()}
    record = about(Run(config, plan, run, run, stats.fingerprint, debug=False), {"step": steps, "last_loss": 0.1})
    write_adapter(run / "adapter", adapted, in_dtype(weights, dtype), tokenizer, record)
    return folder / "adapter"


def examples() -> Examples:
    """The rows that `trained` learns, and their beginnings as prompts."""
    batch = tiny_models.batch()
    schema = pa.schema({name: pa.list_(pa.int32()) for name in ("input_ids", "labels")})
    rows = pa.table({name: batch[name].tolist() for name in ("input_ids", "labels")}, schema)
    prompts = [
        {"prompt": "", "expected": "", "input_ids": row[:NUM_PROMPT_TOKENS]} for row in rows["input_ids"].to_pylist()
    ]
    return Examples(rows, prompts)
