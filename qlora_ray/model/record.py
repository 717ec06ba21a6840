"""What an adapter says of itself in qlora_ray.json: its base, how that was quantized, and the run behind it.

Imports no torch: what does not fit is refused before anything is loaded.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_ray.config import EMBEDDED_BASE, ModelConfig, QuantizationConfig, base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import check_folder, read_facts, read_shapes, weight_files
from qlora_ray.model.hub import local_folder
from qlora_ray.model.own_code import code_digest, refuse_unread_code
from qlora_ray.model.rope import context_length
from qlora_ray.model.tensors import TensorFiles

FILE = "qlora_ray.json"
LAYOUT = 1


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that has been checked, and the folder of its base."""

    folder: Path
    base: str  # local folder
    peft: dict[str, Any]  # adapter_config.json
    record: dict[str, Any]

    @property
    def quantization(self) -> QuantizationConfig:
        """As the base was quantized in training."""
        return QuantizationConfig.model_validate(self.record["quantization"])

    @property
    def packed_stacks(self) -> list[str]:
        """Experts that were in 4 bits in training; none in adapters of earlier versions."""
        return self.record.get("four_bit_stacks", [])

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype that training computed in, e.g. "bfloat16"."""
        return self.record["quantization"]["compute_dtype"]

    @property
    def model(self) -> ModelConfig:
        """The base as `load_base` takes it."""
        base = self.record["base"]
        pin = base.get("code") or base["revision"]  # adapters of earlier versions know the commit alone
        remote = {"trust_remote_code": True, "revision": pin} if base["trust_remote_code"] else {}
        return ModelConfig(base_model=self.base, factory=base.get("factory"), rope_scaling=self.rope_scaling, **remote)

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """What was put on the base's config in training; None also in adapters of earlier versions."""
        return self.record["base"].get("rope_scaling")

    @property
    def context_length(self) -> int | None:
        """Most tokens that base and adapter were made for at a time; None where the base's config does not say."""
        return context_length(read_facts(self.base).context_length, self.rope_scaling)

    @property
    def num_token_rows(self) -> int:
        """Rows that embedding and output layer must have at least for the adapter's own tokens; 0 without such."""
        return rows_of_tokens(self.peft.get("trainable_token_indices"))

    @property
    def run(self) -> Path | None:
        """The run directory that the adapter still lies in, if any."""
        return self.folder.parent if (self.folder.parent / "manifest.json").is_file() else None

    def sha256(self) -> str:
        """Digest of the adapter's weights and record."""
        digest = hashlib.sha256()
        for name in ("adapter_model.safetensors", "adapter_config.json", FILE):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()


def base_tensors(folder: str, key: str) -> TensorFiles:
    """The tensors that transformers would load from a model's folder. Raises ConfigError."""
    return TensorFiles(weight_files(Path(folder), key), key)


def describe_base(model: ModelConfig) -> dict[str, Any]:
    """The record's `base`: what it is called, and what it is."""
    base_model, revision = model.base_model, model.revision
    folder = local_folder(base_model, revision)
    facts = read_facts(folder)
    is_local = base_model != EMBEDDED_BASE and Path(base_model_path(base_model)).is_dir()
    return {
        "base_model": str(Path(folder).resolve()) if is_local else base_model,
        "revision": revision,
        "commit": Path(folder).name if Path(folder).parent.name == "snapshots" else None,  # the hub cache's layout
        "trust_remote_code": model.trust_remote_code,
        "code": code_digest(folder) if model.trust_remote_code else None,
        "factory": model.factory,
        "model_type": facts.model_type,
        "num_parameters": facts.num_parameters,
        "sha256": facts.fingerprint,
        "sample_sha256": base_tensors(folder, f"model.base_model={folder}").sample_sha256(),
    }


def rows_of_tokens(indices: dict[str, list[int]] | None) -> int:
    """Rows that a base must have at least for these trained rows, by layer (PEFT's `trainable_token_indices`)."""
    return max((max(rows) + 1 for rows in (indices or {}).values()), default=0)


def tokenizer_sha256(tokenizer) -> str:
    """Digest (16 hex digits) of what decides how messages become tokens."""
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def find_adapter(name: str, asked: str | None = None) -> Path:
    """The adapter folder that a user means: itself, or a run directory's best adapter. Raises ConfigError.

    `asked` is what messages call it.
    """
    path, asked = Path(name).expanduser(), asked or f"--adapter {name}"
    if not path.is_dir():
        raise ConfigError(f"{asked}: no such folder. Name an adapter folder or a run directory.")
    if (path / "adapter_config.json").is_file():
        return path
    for inner in ("adapter_best", "adapter"):
        if (path / inner / "adapter_config.json").is_file():
            return path / inner
    if (path / "metrics.jsonl").exists() or (path / "config.yaml").exists():
        raise ConfigError(f"{asked}: this run has no adapter yet. Finish it: the command that began it, with --resume.")
    raise ConfigError(f"{asked}: holds no adapter (adapter_config.json, or a run's adapter_best/ or adapter/).")


def open_adapter(name: str, base: str | None = None) -> Adapter:
    """Find and check an adapter and its base; `base` says where the base lies now. Raises ConfigError."""
    folder = find_adapter(name)
    key = f"--adapter {folder}"
    peft, record = read_json(folder / "adapter_config.json", key), read_record(folder, key)
    check_weights(folder, peft, key)
    wanted = record["base"]
    asked = f"--base {base}" if base else f"{key}: its base {wanted['base_model']}"
    found = local_folder(base or wanted["base_model"], wanted["commit"] or wanted["revision"], asked)
    check_folder(found)
    facts = read_facts(found)
    tensors = base_tensors(found, asked)
    sample = tensors.sample_sha256()
    if sample != wanted["sample_sha256"]:
        raise ConfigError(
            f"{key}: was trained on another base than {found}: {wanted['model_type']} of "
            f"{wanted['num_parameters']:,} parameters, weights {wanted['sample_sha256']}; this is {facts.model_type} "
            f"of {facts.num_parameters:,} parameters, weights {sample}. Name the right one with --base."
        )
    _check_fit(folder, read_shapes(found, is_tied=False), key)
    adapter = Adapter(folder, found, peft, record)
    refuse_unread_code(found, adapter.model, asked)
    return adapter


def read_record(folder: Path, key: str) -> dict[str, Any]:
    """The record of an adapter folder. Raises ConfigError."""
    if not (folder / FILE).is_file():
        raise ConfigError(
            f"{key}: no {FILE}, which says how its base was quantized. Adapters written by qlora_ray.train carry it."
        )
    record = read_json(folder / FILE, key)
    if record.get("layout") != LAYOUT:
        raise ConfigError(f"{key}: {FILE} has layout {record.get('layout')}; this version reads layout {LAYOUT}.")
    if {"base", "quantization", "tokenizer_sha256"} - record.keys():
        raise ConfigError(f"{key}: {FILE} lacks base, quantization or tokenizer_sha256. Copy the adapter again.")
    return record


def check_weights(folder: Path, peft: dict[str, Any], key: str) -> None:
    """Raise ConfigError for an adapter of another kind than LoRA, or without its matrices."""
    entries = TensorFiles([folder / "adapter_model.safetensors"], key).entries
    if peft.get("peft_type") != "LORA":
        raise ConfigError(f"{key}: peft_type is {peft.get('peft_type')}; only LORA is known here.")
    if not any(".lora_A." in name for name in entries):
        raise ConfigError(f"{key}: adapter_model.safetensors holds no LoRA matrices.")


def _check_fit(folder: Path, base: dict[str, tuple[int, ...]], key: str) -> None:
    """Compare the shapes of each LoRA with its layer's, where the base's files have that layer by name."""
    entries = TensorFiles([folder / "adapter_model.safetensors"], key).entries
    for name, entry in entries.items():
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        other = entries.get(name.replace(".lora_A.", ".lora_B."))
        names = f"{module}.weight", f"{module.partition('.')[2]}.weight"  # with and without the model's prefix
        stored = next((base[name] for name in names if name in base), None)
        if not name.endswith(".lora_A.weight") or other is None or stored is None:
            continue
        if sorted(stored) != sorted((entry.shape[1], other.shape[0])):  # Conv1D stores (in, out)
            raise ConfigError(
                f"{key}: does not fit its base: {module} is {' x '.join(map(str, stored))} there, its LoRA is "
                f"for {other.shape[0]} x {entry.shape[1]}. Copy the adapter again."
            )


def read_json(path: Path, key: str) -> dict[str, Any]:
    """The JSON object that a file of an adapter holds. Raises ConfigError."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path.name} cannot be read ({error}). Copy the adapter again.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: {path.name} does not hold a JSON object. Copy the adapter again.")
    return values
