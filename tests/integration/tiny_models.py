"""Tiny random models of many families, and a batch for them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_ray.config import Config, base_model_path

SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, vocab_size=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GPT = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=2048, bos_token_id=1, eos_token_id=2)
FAMILIES: dict[str, dict] = {
    "llama": {}, "mistral": {}, "ministral": {"head_dim": 16}, "gemma": {"head_dim": 16}, "qwen2": {},
    "qwen3": {"head_dim": 16}, "gemma2": {"head_dim": 16}, "gemma3_text": {"head_dim": 16}, "phi3": {}, "gpt2": GPT,
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "olmo2": {}, "granite": {}, "glm4": {"head_dim": 16}, "smollm3": {}, "falcon": {"new_decoder_architecture": False},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
}  # fmt: skip
LATENT = dict(q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
MIXTURES: dict[str, dict] = {
    "mixtral": FAMILIES["mixtral"], "qwen3_moe": FAMILIES["qwen3_moe"],
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16, "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, **LATENT,
    },
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, **LATENT,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "head_dim": 16},
}  # fmt: skip


def save(family: str, folder: Path, **more: Any) -> str:
    """Write a random model of a family, with the embedded base's tokenizer; returns the folder."""
    sizes = {**({} if family == "gpt2" else SIZES), **{**FAMILIES, **MIXTURES}[family], **more}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_path("embedded")).save_pretrained(folder)
    return str(folder)


def make_config(base: str, **sections: dict) -> Config:
    return Config.model_validate({**sections, "model": {"base_model": base, "lora_r": 8, **sections.get("model", {})}})


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of 24 random tokens, the last 16 trained on."""
    ids = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"], use_cache=False).logits.float()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of two logits of one place, in units of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
