"""The model card of an adapter: README.md with the front matter that the model hub reads. Imports no torch."""

import json
from typing import Any

import yaml

from qlora_ray.config import OBJECTIVES, ModelConfig, TrainingConfig

METRICS = {
    "first_loss": "training loss, first step (nats per token)",
    "last_loss": "training loss, last logged step (nats per token)",
    "eval_loss": "validation loss (nats per token)",
    "best_eval_loss": "best validation loss (nats per token)",
    "exact_match_base": "exact match of the base on held-out prompts",
    "exact_match_adapter": "exact match with the adapter on held-out prompts",
    "num_tokens": "tokens read",
    "num_label_tokens": "tokens trained on",
}


def render(record: dict[str, Any]) -> str:
    """The card of an adapter whose record this is."""
    base, quantization, data = record["base"], record["quantization"], record["data"]
    name = base["base_model"]
    is_hub_id = name != "embedded" and not name.startswith("/")
    front: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "qlora"]}
    if is_hub_id:
        front["base_model"] = name
    double = ", double quantization" if quantization["double_quant"] else ""
    objective = record["config"].get("training", {}).get("objective", "sft")
    unit = "nats per token" if objective == "sft" else f"{objective}, mean over pairs"
    facts = {
        "base": f"{name} ({base['model_type']}, {base['num_parameters']:,} parameters)",
        "base revision": base["commit"] or base["revision"] or "none: a local folder",
        "base weights": f"sample sha256 {base['sample_sha256']}",
        **_of_rope(base),
        **_of_start(record),
        **({} if objective == "sft" else {"objective": _shown_objective(record["config"]["training"])}),
        "LoRA": _shown_lora(record["config"].get("model", {})),
        "quantization": f"{quantization['type']}{double}, computed in {quantization['compute_dtype']}",
        "data": f"{data['num_rows']:,} rows, {data['num_tokens']:,} tokens, {data['num_validation_rows']:,} rows held "
        "out",
        **_of_rows(record),
        "data fingerprint": data["fingerprint"],
        "step": f"{record['step']:,}",
        "run": f"{record['run_name']}, {record['num_workers']} worker(s)",
        "code": record["git_commit"] or f"qlora_ray {record['versions']['qlora_ray']}",
    }
    metrics = {
        METRICS[key].replace("nats per token", unit): _shown(key, value)
        for key, value in record["metrics"].items()
        if key in METRICS
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            f"# {record['run_name']}",
            "",
            f"A LoRA on {name}, trained with qlora_ray. It belongs to this base, quantized like this, and to no other.",
            "",
            *_table("what", "", facts),
            "",
            *_table("metric", "value", metrics),
            "",
            "## Use",
            "",
            "```",
            'python -m qlora_ray.generate --adapter . --prompt "..."',
            "python -m qlora_ray.export --adapter . --to merged --output merged --verify",
            "```",
            "",
            "## Reproduce",
            "",
            "Save this as `config.yaml`, then `python -m qlora_ray.train -c config.yaml`:",
            "",
            "```yaml",
            yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
            "",
        ]
    )


def render_merged(record: dict[str, Any], dtype: str, into: str) -> str:
    """The card of a model that an adapter was merged into."""
    base, quantization = record["base"], record["quantization"]
    weights = (
        f"the {quantization['type']} weights of training, unpacked" if into == "training" else "the original weights"
    )
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            f"# {record['run_name']}, merged",
            "",
            f"{base['base_model']} ({base['model_type']}, {base['num_parameters']:,} parameters) with the LoRA of the "
            f"run {record['run_name']}, step {record['step']:,}, added to {weights}; stored in {dtype} by qlora_ray.",
            "",
        ]
    )


def _shown_objective(settings: dict[str, Any]) -> str:
    """Objective of pairs with its settings; `settings` are those of its config's training that are not defaults."""
    training = TrainingConfig.model_validate(settings)
    return f"{training.objective}, " + ", ".join(f"{n} {getattr(training, n)}" for n in OBJECTIVES[training.objective])


def _of_rope(base: dict[str, Any]) -> dict[str, str]:
    """What must be put on the base's config, wherever it is loaded with the adapter; nothing where it is as it was."""
    if not base.get("rope_scaling"):
        return {}
    given = json.dumps(base["rope_scaling"])
    return {"RoPE": f"`rope_scaling` {given} on the base's config; in plain transformers see docs/bases.md"}


def _of_start(record: dict[str, Any]) -> dict[str, str]:
    """The adapters that this one was gone on from, the newest first; nothing where it began anew."""
    shown, before = [], record.get("start_from")
    while before:
        name = f"{before['run_name']}, step {before['step']:,}" if "run_name" in before else "an adapter"
        shown.append(f"{name} ({before['path']}, sha256 {before['sha256']})")
        before = before.get("start_from")
    return {"started from": ", which was started from ".join(shown)} if shown else {}


def _of_rows(record: dict[str, Any]) -> dict[str, str]:
    """New tokens, and how many rows the base must have for them; nothing where there are none."""
    if not record.get("token_rows"):
        return {}
    tokens = ", ".join(f"`{token}`" for token in record["config"]["model"]["new_tokens"])
    rows = f"base.resize_token_embeddings({record['token_rows']})"
    return {"new tokens": f"{tokens}; in plain PEFT call `{rows}` first, unless the base has as many rows"}


def _shown_lora(settings: dict[str, Any]) -> str:
    """Rank, scale and layers of an adapter; `settings` are those of its config that are not defaults."""
    model = ModelConfig.model_validate(settings)
    wanted, excluded = (
        ", ".join(value) if isinstance(value, list) else value
        for value in (model.target_modules, model.exclude_modules)
    )
    parts = [
        f"r {model.lora_r}, alpha {model.lora_alpha:g}, on {wanted}" + (f" without {excluded}" if excluded else "")
    ]
    parts += ["each expert r / experts of a token"] * model.expert_lora
    patterns: dict[str, dict[str, Any]] = {"r": model.rank_pattern, "alpha": model.alpha_pattern}
    parts += [
        f"{name} " + ", ".join(f"{value:g} in {pattern}" for pattern, value in some.items())
        for name, some in patterns.items()
        if some
    ]
    return "; ".join(parts)


def _table(left: str, right: str, rows: dict[str, str]) -> list[str]:
    return [f"| {left} | {right} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _shown(key: str, value: float) -> str:
    if key.startswith("exact"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
