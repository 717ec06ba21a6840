"""The adapter that a run goes on from (model.start_from): found, compared with what the run will build, and loaded.

It may also be one that plain PEFT wrote: without a record, its base cannot be told from another of the same shape.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_ray.config import Config, ModelConfig
from qlora_ray.errors import ConfigError
from qlora_ray.model.record import FILE, base_tensors, check_weights, find_adapter, read_json, read_record
from qlora_ray.model.tensors import TensorFiles

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
# What PEFT can do with LoRA matrices, and a run here cannot go on with.
UNKNOWN_HERE = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
REWRITE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
LINEAGE = ("run_name", "step", "start_from")
DEFAULT_OF_PEFT = {"r": 8, "lora_alpha": 8}
SHOWN = 3


@dataclass(frozen=True)
class Start:
    """An adapter folder whose settings are those of the run."""

    asked: str  # model.start_from=..., for messages
    folder: Path
    peft: dict[str, Any]  # adapter_config.json
    record: dict[str, Any] | None  # None: not written by qlora_ray

    @property
    def weights(self) -> Path:
        """The file of its matrices."""
        return self.folder / WEIGHTS

    def lineage(self) -> dict[str, Any]:
        """What the record of the run's own adapter says of it, and of what it was started from itself."""
        with self.weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        known = {name: value for name, value in (self.record or {}).items() if name in LINEAGE}
        return {"path": str(self.folder), "sha256": digest, **known}


def open_start(model: ModelConfig) -> Start | None:
    """The adapter of model.start_from, of the run's rank, scale and variant; None without. Raises ConfigError."""
    if model.start_from is None:
        return None
    asked = f"model.start_from={model.start_from}"
    folder = find_adapter(model.start_from, asked)
    peft = read_json(folder / SETTINGS, asked)
    check_weights(folder, peft, asked)
    start = Start(asked, folder, peft, read_record(folder, asked) if (folder / FILE).is_file() else None)
    _refuse_other_kinds(start)
    _check_settings(start, model)
    return start


def check_base(start: Start, base: str, model: ModelConfig) -> None:
    """Raise ConfigError where the record names other weights than those in the folder of the run's base, or a RoPE."""
    if start.record is None:
        return
    wanted = start.record["base"]
    sample = base_tensors(base, start.asked).sample_sha256()
    if sample != wanted["sample_sha256"]:
        raise ConfigError(
            f"{start.asked}: was trained on another base: {wanted['base_model']}, weights {wanted['sample_sha256']}; "
            f"model.base_model is {base}, weights {sample}. Name the base that it was trained on."
        )
    if wanted.get("rope_scaling") and not model.rope_scaling:
        raise ConfigError(
            f"{start.asked}: was trained with model.rope_scaling={wanted['rope_scaling']}, and this run has none. Give "
            "the same."
        )


def check_tensors(start: Start, wanted: dict[str, tuple[int, ...]], model: ModelConfig) -> None:
    """Raise ConfigError where the adapter's tensors, by PEFT's names, are not those that the run will train."""
    found = {name: entry.shape for name, entry in TensorFiles([start.weights], start.asked).entries.items()}
    missing, unknown = (_layers(names) for names in (wanted.keys() - found.keys(), found.keys() - wanted.keys()))
    if missing or unknown:
        parts = [f"it has none for {_some(missing)}"] * bool(missing) + [f"it has {_some(unknown)} too"] * bool(unknown)
        raise ConfigError(
            f"{start.asked}: does not adapt the layers that this run does: {'; '.join(parts)}. Its target_modules are "
            f"{_shown(start.peft.get('target_modules'))}, modules_to_save {_shown(start.peft.get('modules_to_save'))}; "
            f"the run has model.target_modules={_shown(model.target_modules)}, "
            f"model.modules_to_save={_shown(model.modules_to_save)}. Name the same."
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ConfigError(
                f"{start.asked}: {name} is {_by(found[name])} there and {_by(shape)} in this run. Use the base, the "
                f"model.lora_r and the model.rank_pattern that it was trained with: {_shown(start.peft['r'])}, "
                f"{_shown(start.peft.get('rank_pattern') or {})}."
            )


def check_tokens(start: Start, ids: Iterable[int]) -> None:
    """Raise ConfigError where other rows of the embedding are trained than those of the run's new tokens."""
    by_layer = start.peft.get("trainable_token_indices") or {}
    theirs = sorted({token for tokens in by_layer.values() for token in tokens})
    if theirs != sorted(ids):
        raise ConfigError(
            f"{start.asked}: trains the rows of tokens {theirs or 'none'}, this run's model.new_tokens those of "
            f"{sorted(ids) or 'none'}. Set the model.new_tokens that it was trained with."
        )


def notes(start: Start, config: Config) -> list[str]:
    """What a user should know of how the adapter goes with the run, and what cannot be told."""
    if start.record is None:
        base = start.peft.get("base_model_name_or_path")
        return [
            f"{start.asked} has no {FILE}: that its base ({base}) is model.base_model={config.model.base_model} is "
            "not known, only that it fits."
        ]
    then, now = start.record["quantization"], config.quantization.model_dump()
    differ = [name for name in ("type", "double_quant") if then[name] != now[name]]
    changed = [f"quantization.{name} {then[name]} -> {now[name]}" for name in differ]
    return [f"{start.asked} was trained on otherwise stored weights: {', '.join(changed)}."] if changed else []


def copy_weights(start: Start, target: Any) -> None:
    """Put the adapter's files into a folder (storage.Folder) of the run, where each worker finds them."""
    for file in (start.weights, start.folder / SETTINGS):
        (target.make() / file.name).write_bytes(file.read_bytes())


def load_weights(model: Any, content: bytes, adapter_name: str) -> None:
    """Give the model's adapter the values of a safetensors file that `check_tensors` has seen."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load

    found: Any = set_peft_model_state_dict(model, load(content), adapter_name)
    missing = [name for name in found.missing_keys if f".{adapter_name}" in name]
    assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)


def _refuse_other_kinds(start: Start) -> None:
    used = [name for name in UNKNOWN_HERE if start.peft.get(name)]
    if used:
        raise ConfigError(f"{start.asked}: uses PEFT's {', '.join(used)}, which runs here do not know.")
    begun = start.peft.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(REWRITE_THE_BASE):
        raise ConfigError(
            f"{start.asked}: init_lora_weights={begun} rewrote the weights of its base, so it fits no other. Save it "
            "with PEFT's path_initial_model_for_weight_conversion first."
        )


def _check_settings(start: Start, model: ModelConfig) -> None:
    peft = {**DEFAULT_OF_PEFT, **start.peft}
    used = [name for name in ("rslora", "dora") if peft.get(f"use_{name}")]
    variant = " with ".join(used) or "lora"
    # loftq decides how a LoRA begins, which the adapter does here.
    asked = "lora" if model.lora_variant == "loftq" else model.lora_variant
    pairs = (
        ("lora_r", model.lora_r, peft["r"]), ("lora_alpha", model.lora_alpha, peft["lora_alpha"]),
        ("alpha_pattern", model.alpha_pattern, peft.get("alpha_pattern") or {}), ("lora_variant", asked, variant),
    )  # fmt: skip
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise ConfigError(
                f"model.{name}={_shown(ours)}: {start.asked} was trained with {_shown(theirs)}. "
                f"Set model.{name}={_shown(theirs)}, or start from the base."
            )


def _layers(names: Iterable[str]) -> list[str]:
    """The layers that tensors of an adapter belong to, each once."""
    layers = (name.removeprefix("base_model.model.").partition(".lora_")[0] for name in sorted(names))
    return list(dict.fromkeys(layers))


def _some(layers: list[str]) -> str:
    more = len(layers) - SHOWN
    return ", ".join(layers[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(sorted(map(str, value)))}]"
    return f"{value:g}" if isinstance(value, float) else "none" if value in (None, []) else str(value)
