"""Writes the adapter as plain PEFT reads it, with a record and a model card of its own.

<adapter>/
    adapter_config.json, adapter_model.safetensors, tokenizer files     what PEFT and transformers read
    qlora_ray.json                                                      base, quantization, run: model/record.py
    README.md                                                           the same for people: model/card.py
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel

from qlora_ray.config import ModelConfig
from qlora_ray.model import card
from qlora_ray.model.adapter import ADAPTER_NAME
from qlora_ray.model.base import packed_layers
from qlora_ray.model.experts import packed_stacks
from qlora_ray.model.peft_names import for_plain_peft
from qlora_ray.model.record import FILE, LAYOUT, describe_base, rows_of_tokens, tokenizer_sha256
from qlora_ray.rundir import names
from qlora_ray.storage import Folder
from qlora_ray.worker.messages import Run

RECORDED_METRICS = ("first_loss", "last_loss", "eval_loss", "best_eval_loss", "num_tokens", "num_label_tokens")


def in_dtype(weights: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """The weights in the compute dtype, e.g. "bfloat16": exactly what the live model multiplies with."""
    return {name: weight.to(getattr(torch, dtype)).contiguous() for name, weight in weights.items()}


def write_adapter(
    folder: Folder, model: PeftModel, weights: dict[str, torch.Tensor], tokenizer: Any,
    about: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write trained weights, by parameter name, as a PEFT adapter; `about` is its record, without the tokenizer's."""
    exported = {saved: weights[name] for name, saved in names_in_file(model, weights).items()}
    config = for_plain_peft(model, ADAPTER_NAME)
    was_in_training, config.inference_mode = config.inference_mode, True
    with tempfile.TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        config.inference_mode = was_in_training
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            (folder.make() / file.name).write_bytes(file.read_bytes())
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(exported, {"format": "pt"}))
    if about is not None:
        asked: Any = model.peft_config[ADAPTER_NAME]
        record = {
            **about, "tokenizer_sha256": tokenizer_sha256(tokenizer), "four_bit_layers": packed_layers(model),
            "four_bit_stacks": packed_stacks(model),
            "token_rows": rows_of_tokens(asked.trainable_token_indices),
        }  # fmt: skip
        (folder / FILE).write_bytes(json.dumps(record, indent=1).encode())
        (folder / "README.md").write_bytes(card.render(record).encode())


def names_in_file(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """What each trained weight, by parameter name, is called in an adapter's file."""
    from peft import get_peft_model_state_dict

    exported = get_peft_model_state_dict(
        model, state_dict=weights, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    # PEFT asks the modules for the names of what is trained whole, and theirs have moved (worker/flat.py).
    inside = f".modules_to_save.{ADAPTER_NAME}."
    exported |= {name.replace(inside, "."): weight for name, weight in weights.items() if inside in name}
    names = {id(weight): name for name, weight in weights.items()}
    return {names[id(weight)]: saved for saved, weight in exported.items()}


def about(run: Run, reached: dict[str, Any]) -> dict[str, Any]:
    """The record of an adapter of this run at the state that it has reached; the run's manifest.json tells the rest."""
    config, plan = run.config, run.plan
    manifest = json.loads((run.folder / names.MANIFEST).read_bytes())
    reproducible = config.model_dump(
        mode="json", exclude={"ray": {"address", "storage_path", "run_name"}, "logging": True}, exclude_defaults=True
    )
    return {
        "layout": LAYOUT,
        "run_name": run.folder.name,
        "step": reached["step"],
        "base": {
            **_describe_base(
                config.model.base_model, config.model.revision, config.model.trust_remote_code, config.model.factory
            ),
            **({"rope_scaling": config.model.rope_scaling} if config.model.rope_scaling else {}),
        },
        "quantization": {**config.quantization.model_dump(), "compute_dtype": plan.compute_dtype},
        **({"start_from": manifest["start_from"]} if "start_from" in manifest else {}),
        "data": manifest["data"],
        "metrics": {name: reached[name] for name in RECORDED_METRICS if reached.get(name) is not None},
        "versions": manifest["versions"],
        "git_commit": manifest["git_commit"],
        "num_workers": plan.num_workers,
        "config": reproducible,
    }


@functools.lru_cache(maxsize=1)  # reads a little of every tensor; an adapter is written at each better validation
def _describe_base(base: str, revision: str | None, trust_remote_code: bool, factory: str | None) -> dict[str, Any]:
    model = ModelConfig(base_model=base, revision=revision, trust_remote_code=trust_remote_code, factory=factory)
    return describe_base(model)
