"""Tiny random models of many families, and the product's own path to a sharded 4-bit LoRA of one, in this process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_ray.config import Config, base_model_path
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import load_base
from qlora_ray.model.fused import fuse
from qlora_ray.worker.engine import Engine
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, vocab_size=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=2048, bos_token_id=1, eos_token_id=2)
FAMILIES: dict[str, dict] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16}, "phi3": {}, "gpt2": GPT, "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "olmo2": {}, "granite": {}, "glm4": {"head_dim": 16}, "smollm3": {}, "falcon": {"new_decoder_architecture": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
}  # fmt: skip


def save(family: str, folder: Path, **more: Any) -> str:
    """Write a random model of a family, with the embedded base's tokenizer; returns the folder."""
    sizes = FAMILIES[family] if family == "gpt2" else {**SIZES, **FAMILIES[family], **more}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_path("embedded")).save_pretrained(folder)
    return str(folder)


def make_config(base: str, **sections: dict) -> Config:
    return Config.model_validate({**sections, "model": {"base_model": base, "lora_r": 8, **sections.get("model", {})}})


@dataclass
class Sharded:
    """A live engine and the model inside it."""

    engine: Engine
    model: torch.nn.Module


def deepspeed_config(stage: int, dtype: str, **zero) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, **zero}, "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16", "initial_scale_power": 8},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def build(
    config: Config,
    stage: int = 3,
    dtype: str = "float32",
    weights: dict | None = None,
    fused: bool = True,
    device: str = "cpu",
    **zero,
) -> Sharded:
    """4-bit base, LoRA, fused layers, DeepSpeed, as a worker builds them."""
    base = load_base(config.model, config.quantization, dtype, torch.device(device))
    model = add_adapter(base, config.model, getattr(torch, dtype), config.training.seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    if weights:
        for name, parameter in trainable(model).items():
            parameter.data.copy_(weights[name])
    if fused:
        fuse(model)
    return Sharded(Engine(model, config.training, deepspeed_config(stage, dtype, **zero)), model)


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of 24 random tokens, the last 16 trained on."""
    ids = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(sharded: Sharded, steps: range, learning_rate: float = 1e-2, fixed: bool = True) -> list[float]:
    """Optimizer steps; returns the mean nats per token of each."""
    losses = []
    sharded.engine.train()
    for step in steps:
        torch.manual_seed(step)
        device = next(sharded.model.parameters()).device
        rows = {name: values.to(device) for name, values in batch(0 if fixed else step).items()}
        nats = sum_of_nats(sharded.engine, rows)
        sharded.engine.backward(nats / num_label_tokens(rows))
        sharded.engine.add_up(1)
        sharded.engine.step(learning_rate)
        losses.append(float(nats.detach() / num_label_tokens(rows)))
    return losses


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"], use_cache=False).logits.float()
