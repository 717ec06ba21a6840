"""What a base model's folder holds, from its config and safetensors headers. Imports no torch."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_ray.errors import ConfigError
from qlora_ray.model.pickled import converted_folder, pickled_files
from qlora_ray.model.rope import own_kind
from qlora_ray.model.tensors import SAMPLE_BYTES, Entry, read_header

# Names of 2-D weights that transformers does not build as nn.Linear or Conv1D, or that bitsandbytes leaves alone.
NOT_QUANTIZED = re.compile(
    r"(embed|wte|wpe|lm_head|embed_out|score|shared\.weight|\.experts\.|router|block_sparse_moe\.gate|mlp\.gate\.weight)"
)
# Tensors of older files that no parameter is loaded from: causal masks, rotary frequencies, positions.
BUFFERS = re.compile(r"(\.(attn|attention)\.(masked_)?bias|inv_freq|position_ids)$")
HEAD = re.compile(r"(lm_head|embed_out)\.weight$")
EMBEDDING = re.compile(r"(embed_tokens|embed_in|wte|word_embeddings)\.weight$")
LEARNED_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)\.weight$")
EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
# What bitsandbytes lays beside a weight that it has packed; the first holds the weight's own shape.
PACKED_STATE = ".quant_state.bitsandbytes__"
BESIDE_PACKED = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")
MXFP4 = re.compile(r"\.experts\.(gate_up|down)_proj_(blocks|scales)$")  # of gpt_oss
SAMPLES = 16

# What PEFT refuses in which model types (peft/tuners/tuners_utils.py, _check_lora_target_modules_mamba).
PEFT_LEAVES_OUT = ("out_proj", "conv1d")
MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


@dataclass(frozen=True)
class RopeLimit:
    """Longest row of which the angles of each position are its own; in longer ones they depend on the row's length."""

    kind: str  # longrope or dynamic
    num_tokens: int


# Of experts' weights dequantized at a time: a projection of a layer of Mixtral-8x7B, Qwen3-30B-A3B or gpt-oss-20b.
# More than one part a projection needs the number of its rows on the host, which waits for the GPU.
EXPERT_CHUNK_BYTES = 2**31


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of the mixtures of experts of a base, as it will be built."""

    num_experts: int  # of a layer
    num_per_token: int
    hidden: int  # what each token brings
    up: int  # outputs of an expert's first projection
    inner: int  # inputs of its last
    num_layers: int  # that have experts
    num_parameters: int  # of all experts
    num_packed: int  # of these, in 4 bits
    has_bias: bool = False

    @property
    def num_active(self) -> int:
        """Parameters of the experts of one token."""
        return self.num_parameters * self.num_per_token // self.num_experts

    @property
    def largest_stack(self) -> int:
        """Parameters of one projection of all experts of a layer, whichever has more."""
        return self.num_experts * self.hidden * max(self.up, self.inner)


@dataclass(frozen=True)
class BaseFacts:
    """Sizes of a base model."""

    model_type: str
    num_parameters: int
    num_linear_parameters: int  # of the layers that become 4-bit
    num_layers: int
    hidden_size: int
    vocab_size: int
    linear_shapes: tuple[tuple[str, int, int], ...]  # (module name, rows, columns) of each layer that becomes 4-bit
    context_length: int | None
    fingerprint: str  # of names, shapes and sizes; contents are not read
    num_embeddings: int | None = field(default=None, kw_only=True)  # rows of the input embedding
    num_positions: int | None = field(default=None, kw_only=True)  # where each has learned weights; no row is longer
    num_heads: int | None = field(default=None, kw_only=True)  # of queries
    num_key_heads: int | None = field(default=None, kw_only=True)
    rope_limit: RopeLimit | None = field(default=None, kw_only=True)
    own_rope: str | None = field(default=None, kw_only=True)  # for rows longer than usual: yarn, llama3, ...
    takes_rope_scaling: bool = field(default=False, kw_only=True)  # known once the model is built
    is_packed: bool = field(default=False, kw_only=True)  # stored in bitsandbytes' 4 bits
    experts: ExpertSizes | None = field(default=None, kw_only=True)  # known once the model is built

    @property
    def num_packed_parameters(self) -> int:
        """Of everything that becomes 4-bit."""
        return self.num_linear_parameters + (self.experts.num_packed if self.experts else 0)

    @property
    def num_active_parameters(self) -> int:
        """Of everything that a token passes."""
        return self.num_parameters - (self.experts.num_parameters - self.experts.num_active if self.experts else 0)


@dataclass(frozen=True, kw_only=True)
class ModelFacts(BaseFacts):
    """Sizes of a base as it will be built, and of the adapter on it: model/meta.py."""

    num_trainable_parameters: int
    adapted_layers: dict[str, int]  # how many get a LoRA, by the last part of their names
    whole_modules: dict[str, int]  # how many are trained whole, in the same way
    new_tokens: dict[int, list[int]]  # id of each, and the tokens that its text was before
    num_embedding_rows: int  # with those that new tokens need
    has_balancing_loss: bool = False  # of its routers


def read_facts(folder: str) -> BaseFacts:
    """Read a local base model folder. Raises ConfigError where it could not be loaded later."""
    path, key = Path(folder), f"model.base_model={folder}"
    config = _read_model_config(path, key)
    text = {**config, **(config.get("text_config") or {})}
    shapes = read_shapes(folder, is_tied=bool(text.get("tie_word_embeddings")))
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 1 or not BUFFERS.search(name)}
    _check_experts(shapes, key)
    if not any(map(math.prod, shapes.values())):
        raise ConfigError(f"{key}: its *.safetensors hold no weights. Download or copy it again.")
    fingerprint = _fingerprint(path, {name: entry.shape for name, entry in _read_entries(path, key).items()})
    return facts_of(config, shapes, fingerprint)


def facts_of_config(folder: str, shapes: dict[str, tuple[int, ...]]) -> BaseFacts:
    """As read_facts, of a folder that has its config.json alone, and weights of these shapes. Raises ConfigError."""
    return facts_of(_read_model_config(Path(folder), f"model.base_model={folder}"), shapes, fingerprint="")


def facts_of(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], fingerprint: str) -> BaseFacts:
    """Sizes of a base, from its config.json and the shape of each of its weights."""
    text = {**config, **(config.get("text_config") or {})}
    linear = {n: s for n, s in shapes.items() if len(s) == 2 and n.endswith(".weight") and not NOT_QUANTIZED.search(n)}
    return BaseFacts(
        model_type=str(config.get("model_type", "unknown")),
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        num_linear_parameters=sum(math.prod(shape) for shape in linear.values()),
        num_layers=int(text.get("num_hidden_layers") or text.get("n_layer") or 0),
        hidden_size=int(text.get("hidden_size") or text.get("n_embd") or 0),
        vocab_size=int(text.get("vocab_size") or 0),
        linear_shapes=tuple((name.removesuffix(".weight"), *shape) for name, shape in linear.items()),
        context_length=text.get("max_position_embeddings") or text.get("n_positions"),
        fingerprint=fingerprint,
        num_embeddings=_rows_of(shapes, EMBEDDING),
        num_positions=_rows_of(shapes, LEARNED_POSITIONS),
        num_heads=text.get("num_attention_heads") or text.get("n_head"),
        num_key_heads=text.get("num_key_value_heads") or text.get("num_attention_heads") or text.get("n_head"),
        rope_limit=_rope_limit(text),
        own_rope=own_kind(text),
        is_packed=_quantization_of(config) is not None,
    )


def left_out_of_all_linear(model_type: str) -> tuple[str, ...]:
    """Ends of the names of layers that "all-linear" cannot mean, since PEFT refuses to adapt them."""
    return PEFT_LEAVES_OUT if model_type in MAMBA_TYPES else ()


def _rows_of(shapes: dict[str, tuple[int, ...]], names: re.Pattern) -> int | None:
    rows = [shape[0] for name, shape in shapes.items() if len(shape) == 2 and names.search(name)]
    return min(rows) if rows else None


def _rope_limit(text: dict[str, Any]) -> RopeLimit | None:
    """As transformers' dynamic_rope_update switches (transformers/modeling_rope_utils.py)."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    named = rope.get("rope_type") or rope.get("type")
    kind = "longrope" if named == "su" else named  # its older name
    longest = text.get("max_position_embeddings")
    if kind == "longrope":
        key = "original_max_position_embeddings"
        longest = rope.get(key) or text.get(key) or longest
    return RopeLimit(kind, int(longest)) if kind in ("longrope", "dynamic") and longest else None


def check_folder(folder: str) -> None:
    """Raise ConfigError if a local folder lacks what a base model needs. Reads names only: milliseconds."""
    path, key = Path(folder), f"model.base_model={folder}"
    check_config(folder)
    if not has_weights(path, key):
        others = _weights_that_none_loads(path)
        if others:
            raise ConfigError(
                f"{key}: no weights that transformers would load, only {others[0]}. Convert it once with "
                "the script that came with the model, or name a copy saved with save_pretrained."
            )
        raise ConfigError(
            f"{key}: no weights (*.safetensors, or pytorch_model.bin) in the folder. Download or copy it again."
        )
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{key}: no tokenizer (tokenizer.json) in the folder. Save it there with save_pretrained.")


def check_config(folder: str) -> None:
    """Raise ConfigError where config.json cannot be read, or says that the weights are stored as none can be read."""
    key = f"model.base_model={folder}"
    _refuse_other_quantization(_read_model_config(Path(folder), key), key)


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
    """The safetensors files of a base, of pickled weights a converted copy's; none where there are no weights.

    Raises ConfigError for a damaged index, and for what cannot be converted.
    """
    return safetensors_files(Path(loadable_folder(str(path), key)), key) or _other_safetensors(path)


def has_weights(path: Path, key: str) -> bool:
    """Whether a folder holds weights of a kind that can be loaded, converted or not. Raises ConfigError."""
    return bool(safetensors_files(path, key) or pickled_files(path, key) or _other_safetensors(path))


def has_config_alone(folder: str) -> bool:
    """Whether a folder has a config.json, and no weights of any kind. Raises ConfigError."""
    path = Path(folder)
    weights = has_weights(path, f"model.base_model={folder}") or _weights_that_none_loads(path)
    return (path / "config.json").is_file() and not weights


def _weights_that_none_loads(path: Path) -> list[str]:
    return sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))


def loadable_folder(folder: str, key: str) -> str:
    """The folder that transformers loads without a pickle: itself, or its converted copy. Raises ConfigError."""
    return str(converted_folder(Path(folder), key)) if is_pickled(folder) else folder


def is_pickled(folder: str) -> bool:
    """Whether transformers would load a folder's weights from pickled files. Raises ConfigError."""
    path, key = Path(folder), f"model.base_model={folder}"
    return not safetensors_files(path, key) and bool(pickled_files(path, key))


def safetensors_files(path: Path, key: str) -> list[Path]:
    """Those that transformers would load: others may lie beside them. Raises ConfigError for a damaged index."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        return []
    try:
        return sorted({path / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {index.name} is damaged ({error}). Download or copy it again.") from None


def _other_safetensors(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def read_shapes(folder: str, is_tied: bool) -> dict[str, tuple[int, ...]]:
    """Shape of each weight in a local folder's files, unpacked where bitsandbytes has packed it. Raises ConfigError.

    Where output layer and embedding are tied, one that is stored twice is there once.
    """
    path, key = Path(folder), f"model.base_model={folder}"
    entries = _read_entries(path, key)
    shapes = {name: entry.shape for name, entry in entries.items() if not BESIDE_PACKED.search(name)}
    for name, entry in entries.items():
        weight, is_state, _ = name.partition(PACKED_STATE)
        if is_state:
            shapes[weight] = tuple(json.loads(_read(entry, 0, entry.size))["shape"])
    embeddings = [entry for name, entry in entries.items() if is_tied and EMBEDDING.search(name)]
    twice = [n for n, e in entries.items() if HEAD.search(n) and any(_is_same(e, other) for other in embeddings)]
    return _as_dense({name: shape for name, shape in shapes.items() if name not in twice})


def _as_dense(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """With stacks in place of MXFP4's blocks and scales."""
    dense = {name: shape for name, shape in shapes.items() if not MXFP4.search(name)}
    for name, shape in shapes.items():
        if MXFP4.search(name) and name.endswith("_blocks"):  # (E, N, K / 32, 16), two values a byte
            dense[name.removesuffix("_blocks")] = (shape[0], shape[2] * 32, shape[1])
    return dense


def packed_weights(folder: str) -> list[str]:
    """Names of the weights that a local folder's files hold in bitsandbytes' 4 bits. Raises ConfigError."""
    entries = _read_entries(Path(folder), f"model.base_model={folder}")
    return [name.partition(PACKED_STATE)[0] for name in entries if PACKED_STATE in name]


def stored_quantization(folder: str) -> dict[str, Any] | None:
    """What config.json says of weights that are stored quantized, None where they are not. Raises ConfigError."""
    return _quantization_of(_read_model_config(Path(folder), f"model.base_model={folder}"))


def has_mxfp4(folder: str) -> bool:
    """Whether a folder's experts are in MXFP4, which are made dense as they are read. Raises ConfigError."""
    return _is_mxfp4(_read_model_config(Path(folder), f"model.base_model={folder}"))


def _is_mxfp4(config: dict) -> bool:
    stored = config.get("quantization_config") or {}
    return config.get("model_type") == "gpt_oss" and stored.get("quant_method") == "mxfp4"


def _quantization_of(config: dict) -> dict[str, Any] | None:
    """None also of what is made dense."""
    found = None
    if _is_mxfp4(config):
        return None
    for section in (config, config.get("text_config") or {}):
        found = found or section.get("quantization_config") or section.get("compression_config")
    return found


def _refuse_other_quantization(config: dict, key: str) -> None:
    stored = _quantization_of(config)
    if stored is None or stored.get("load_in_4bit"):
        return
    method = stored.get("quant_method") or "an unnamed method"
    name = "8-bit bitsandbytes" if stored.get("load_in_8bit") else method
    raise ConfigError(
        f"{key}: its weights are stored quantized ({name}, quantization_config in config.json); only 16- and 32-bit "
        "weights and bitsandbytes' 4-bit ones can be trained on. Name the model that it was quantized from"
        f"{_from(config)}, or convert it once: load it with dequantization, save_pretrained."
    )


def _from(config: dict) -> str:
    """The model that a quantized one was made from, as far as its config says."""
    name = config.get("_name_or_path")
    return f" (its config.json says {name})" if isinstance(name, str) and name else ""


def _is_same(one: Entry, other: Entry) -> bool:
    """Whether two tensors are the same as far as SAMPLES pieces of them tell."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    places = [(one.size - SAMPLE_BYTES) * i // (SAMPLES - 1) for i in range(SAMPLES)]
    return all(_read(one, max(0, at), SAMPLE_BYTES) == _read(other, max(0, at), SAMPLE_BYTES) for at in places)


def _read(entry: Entry, at: int, size: int) -> bytes:
    with entry.file.open("rb") as file:
        file.seek(entry.offset + at)
        return file.read(min(size, entry.size - at))


def _check_experts(shapes: dict[str, tuple[int, ...]], key: str) -> None:
    """Raise ConfigError where an expert lacks what another of its layer has."""
    experts: dict[str, set[str]] = {}
    kinds: dict[str, set[str]] = {}
    for name in shapes:
        if match := EXPERT.fullmatch(name):
            experts.setdefault(match[1], set()).add(match[2])
            kinds.setdefault(match[1], set()).add(match[3])
    for layer, numbers in experts.items():
        missing = [f"{layer}{n}{kind}" for n in numbers for kind in kinds[layer] if f"{layer}{n}{kind}" not in shapes]
        if missing:
            raise ConfigError(f"{key}: its files are without {min(missing)}. Download or copy it again.")


def _read_entries(path: Path, key: str) -> dict[str, Entry]:
    return {name: entry for file in weight_files(path, key) for name, entry in read_header(file, key).items()}
