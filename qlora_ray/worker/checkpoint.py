"""A checkpoint: LoRA weights, optimizer state and a cursor, world-size-free, closed by a manifest of sha256 sums.

checkpoints/step_00000100/
    adapter.safetensors     LoRA weights, float32, by parameter name
    optimizer.safetensors   exp_avg and exp_avg_sq, float32, as "<parameter>/<key>"
    state.json              step, loss scale, best validation, fingerprint of what must not change
    manifest.json           size and sha256 of each file above; written last: without it there is no checkpoint
"""

import hashlib
import json
import logging
from typing import Any

import safetensors.torch

from qlora_ray.checkpoints import MANIFEST, newest_whole, with_manifest
from qlora_ray.storage import Folder
from qlora_ray.worker.engine import MOMENTS, AdapterState


def save(run: Folder, state: AdapterState, progress: dict[str, Any], keep: int) -> str:
    """Write one checkpoint whole, then remove all but the newest `keep`. One process calls this; returns its name."""
    folder, name = run / "checkpoints", f"step_{progress['step']:08d}"
    temporary = folder / f".{name}.tmp"
    if temporary.exists():
        temporary.delete()
    temporary.make()
    files = {
        "adapter.safetensors": safetensors.torch.save(_contiguous(state.weights)),
        "optimizer.safetensors": safetensors.torch.save(
            _contiguous({f"{which}/{key}": values[key] for which, values in state.moments.items() for key in MOMENTS})
        ),
        "state.json": json.dumps(
            {**progress, "optimizer_step": state.optimizer_step, "loss_scale": state.loss_scale}, indent=1
        ).encode(),
    }
    manifest = {}
    for file, content in files.items():
        (temporary / file).write_bytes(content)
        manifest[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (temporary / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())
    if (folder / name).exists():
        (folder / name).delete()
    temporary.rename(folder / name)
    for old in with_manifest(run)[:-keep]:
        old.delete()
    return name


def load_latest(run: Folder) -> tuple[AdapterState, dict[str, Any]] | None:
    """The newest whole checkpoint of a run, with its progress; None where there is none. Raises BrokenCheckpoint."""
    found = newest_whole(run)
    if found is None:
        return None
    checkpoint, files, broken = found
    for reason in broken:
        logging.getLogger(__name__).warning("%s Going on from %s.", reason, checkpoint.name)
    weights = safetensors.torch.load(files["adapter.safetensors"])
    flat = safetensors.torch.load(files["optimizer.safetensors"])
    moments: dict[str, dict] = {name: {key: flat[f"{name}/{key}"] for key in MOMENTS} for name in weights}
    progress = json.loads(files["state.json"])
    step, scale = progress.pop("optimizer_step"), progress.pop("loss_scale")
    return AdapterState(weights, moments, step, scale), progress


def _contiguous(tensors: dict) -> dict:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
