"""The local folder of a base model: a folder, the embedded base, or a snapshot in the hub's cache."""

import os
from pathlib import Path

from qlora_ray.config import base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import has_weights, safetensors_files

PICKLED = ["pytorch_model*.bin"]
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]  # code is run only where it is trusted


def local_folder(base_model: str, revision: str | None, key: str = "model.base_model") -> str:
    """The folder of the base on this machine; a hub id is downloaded to the hub's cache. Raises ConfigError.

    Pickled weights are downloaded only where the hub has no others.
    """
    base = base_model_path(base_model)
    if os.path.isdir(base):
        return base
    if not _may_be_hub_id(base):
        raise ConfigError(f"{key}={base}: no such folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        folder = snapshot_download(base, revision=revision, allow_patterns=PATTERNS)
        if not safetensors_files(Path(folder), key):
            folder = snapshot_download(base, revision=revision, allow_patterns=PATTERNS + PICKLED)
        return folder
    except (OSError, HTTPError, HFValidationError) as error:  # its own errors derive from these
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}={base}: no such folder, and the model hub did not give it: {reason} "
            "Name a local folder saved with save_pretrained."
        ) from error


def folder_at_hand(base_model: str, revision: str | None) -> str | None:
    """The folder of the base if it is on this machine already; nothing is downloaded, and the hub is not asked."""
    base = base_model_path(base_model)
    if os.path.isdir(base):
        return base
    if not _may_be_hub_id(base):
        return None
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(base, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if is_offline_mode() or has_weights(Path(folder), base) else None


def _may_be_hub_id(base: str) -> bool:
    return not (os.path.isabs(base) or base.startswith("."))
