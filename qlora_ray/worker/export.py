"""Writes the adapter as plain PEFT reads it: adapter_config.json, adapter_model.safetensors, the tokenizer."""

import tempfile
from pathlib import Path

import safetensors.torch
import torch

from qlora_ray.model.adapter import ADAPTER_NAME
from qlora_ray.storage import Folder


def write_adapter(
    folder: Folder, model: torch.nn.Module, weights: dict[str, torch.Tensor], tokenizer, dtype: str
) -> None:
    """Write the adapter in the compute dtype: exactly what the live model multiplies with."""
    from peft import get_peft_model_state_dict

    values = {name: weight.to(getattr(torch, dtype)).contiguous() for name, weight in weights.items()}
    exported = get_peft_model_state_dict(
        model, state_dict=values, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    config = model.peft_config[ADAPTER_NAME]
    was_in_training, config.inference_mode = config.inference_mode, True
    with tempfile.TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            (folder.make() / file.name).write_bytes(file.read_bytes())
    config.inference_mode = was_in_training
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(exported, {"format": "pt"}))
