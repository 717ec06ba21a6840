"""Code that comes with a base: run only where it is trusted, and only the code that was read."""

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_ray.config import ModelConfig
from qlora_ray.errors import ConfigError

NAMED_IN = ("config.json", "tokenizer_config.json")  # which class lies in which file of the folder


def code_digest(folder: str) -> str:
    """Digest (40 hex digits) of the Python files of a folder, names and contents."""
    digest = hashlib.sha256()
    for file in _code_of(folder):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()[:40]


def refuse_unread_code(folder: str, model: ModelConfig, key: str) -> None:
    """Raise ConfigError where a base's own code is needed and not trusted, or is not what model.revision pins.

    That is the commit of a snapshot of the hub, or code_digest of a folder.
    """
    classes = _own_classes(folder)
    if not classes:
        return
    if not model.trust_remote_code:
        if model.factory is None and _is_needed(folder):
            raise ConfigError(
                f"{key}: is built by code of its own ({_names(folder)}), which transformers does not have. Read that "
                f"code; to run it set model.trust_remote_code=true and model.revision={_pin_of(folder)}."
            )
        return
    elsewhere = sorted(name for name in classes if "--" in name)
    if elsewhere:
        raise ConfigError(
            f"{key}: its code lies in another repository ({elsewhere[0]} in auto_map), which no revision of this one "
            "pins. Copy the Python files into a folder with the model, and leave the repository out of auto_map."
        )
    digest = code_digest(folder)
    if model.revision not in (_pin_of(folder), digest):
        raise ConfigError(
            f"{key}: the digest of its code ({_names(folder)}) is {digest}, not {model.revision}. Read it; to run it "
            f"set model.revision={_pin_of(folder)}."
        )


def _pin_of(folder: str) -> str:
    path = Path(folder).absolute()
    return path.name if path.parent.name == "snapshots" else code_digest(folder)  # the hub cache's layout


def _code_of(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*.py"))


def _names(folder: str) -> str:
    return ", ".join(str(file.relative_to(folder)) for file in _code_of(folder)) or "no Python file is there"


def _own_classes(folder: str) -> list[str]:
    """What auto_map names: module.Class, or repository--module.Class."""
    found: list[Any] = []
    for name in NAMED_IN:
        for value in _read(Path(folder) / name).get("auto_map", {}).values():
            found += value if isinstance(value, list) else [value]
    return [value for value in found if isinstance(value, str)]


def _is_needed(folder: str) -> bool:
    config = _read(Path(folder) / "config.json")
    if "auto_map" not in config:
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") not in CONFIG_MAPPING_NAMES


def _read(file: Path) -> dict[str, Any]:
    """A JSON object that is checked elsewhere: {} where there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("auto_map", {}), dict) else {}
