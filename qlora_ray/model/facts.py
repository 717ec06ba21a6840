"""What a base model's folder holds, from its config and safetensors headers. Imports no torch."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from qlora_ray.config import ConfigError
from qlora_ray.model.tensors import read_header

# Names of 2-D weights that transformers does not build as nn.Linear or Conv1D, or that bitsandbytes leaves alone.
NOT_QUANTIZED = re.compile(
    r"(embed|wte|wpe|lm_head|embed_out|score|shared\.weight|\.experts\.|router|block_sparse_moe\.gate|mlp\.gate\.weight)"
)
# Experts' matrices and routers, and the models where PEFT adapts both as its target modules say of the files' names
# (peft/utils/transformers_weight_conversion.py).
EXPERT_LINEAR = re.compile(r"(\.experts\.\d+\.\w+|block_sparse_moe\.gate|mlp\.gate)\.weight$")
ADAPTED_EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe"}

# Model types whose decoder layers compute exactly what model/layer.py does, and the class of these layers.
FUSED_LAYERS = {"llama": "LlamaDecoderLayer", "mistral": "MistralDecoderLayer", "qwen2": "Qwen2DecoderLayer"}


@dataclass(frozen=True)
class BaseFacts:
    """Sizes of a base model."""

    model_type: str
    num_parameters: int
    num_linear_parameters: int  # of the layers that become 4-bit
    num_expert_parameters: int  # of fused mixture-of-experts weights, which stay 16-bit
    num_layers: int
    hidden_size: int
    vocab_size: int
    linear_shapes: tuple[tuple[str, int, int], ...]  # (module name, rows, columns) of each layer that becomes 4-bit
    context_length: int | None
    fingerprint: str  # of names, shapes and sizes; contents are not read
    expert_shapes: tuple[tuple[str, int, int], ...] = ()  # the same of experts and routers that PEFT can adapt


def read_facts(folder: str) -> BaseFacts:
    """Read a local base model folder. Raises ConfigError where it could not be loaded later."""
    path, key = Path(folder), f"model.base_model={folder}"
    config = _read_model_config(path, key)
    text = {**config, **(config.get("text_config") or {})}
    shapes = _read_shapes(path, key)
    linear = {n: s for n, s in shapes.items() if len(s) == 2 and n.endswith(".weight") and not NOT_QUANTIZED.search(n)}
    model_type = str(config.get("model_type", "unknown"))
    experts = {n: s for n, s in shapes.items() if len(s) == 2 and EXPERT_LINEAR.search(n)}
    return BaseFacts(
        model_type=model_type,
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        num_linear_parameters=sum(math.prod(shape) for shape in linear.values()),
        num_expert_parameters=sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name),
        num_layers=int(text.get("num_hidden_layers") or text.get("n_layer") or 0),
        hidden_size=int(text.get("hidden_size") or text.get("n_embd") or 0),
        vocab_size=int(text.get("vocab_size") or 0),
        linear_shapes=tuple((name.removesuffix(".weight"), *shape) for name, shape in linear.items()),
        context_length=text.get("max_position_embeddings") or text.get("n_positions"),
        fingerprint=_fingerprint(path, shapes),
        expert_shapes=tuple((name.removesuffix(".weight"), *shape) for name, shape in experts.items())
        if model_type in ADAPTED_EXPERTS
        else (),
    )


def check_folder(folder: str) -> None:
    """Raise ConfigError if a local folder lacks what a base model needs. Reads names only: milliseconds."""
    path, key = Path(folder), f"model.base_model={folder}"
    _read_model_config(path, key)
    if not weight_files(path, key):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in path.glob(pattern))
        if pickled:
            raise ConfigError(
                f"{key}: only pickled weights ({pickled[0]}), which can run code when loaded. Convert them once: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)."
            )
        raise ConfigError(f"{key}: no weights (*.safetensors) in the folder.")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{key}: no tokenizer (tokenizer.json) in the folder. Save it there with save_pretrained.")


def _read_model_config(path: Path, key: str) -> dict:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{key}: no config.json in the folder; is it a model saved with save_pretrained?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: config.json is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{key}: config.json does not hold a JSON object.")
    return config


def _fingerprint(path: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    sizes = [(file.name, file.stat().st_size) for file in weight_files(path, "")]
    return hashlib.sha256(json.dumps([sizes, sorted(shapes.items())]).encode()).hexdigest()[:16]


def weight_files(path: Path, key: str) -> list[Path]:
    # The files that transformers would load: the index's, else model.safetensors; others may lie beside them.
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        return sorted(path.glob("*.safetensors"))
    try:
        return sorted({path / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {index.name} is damaged ({error}). Download or copy it again.") from None


def _read_shapes(path: Path, key: str) -> dict[str, tuple[int, ...]]:
    entries = {name: entry for file in weight_files(path, key) for name, entry in read_header(file, key).items()}
    return {name: entry.shape for name, entry in entries.items()}
