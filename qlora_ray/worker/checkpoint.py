"""A checkpoint: LoRA weights, optimizer state and a cursor, world-size-free, closed by a manifest of sha256 sums.

checkpoints/step_00000100/
    adapter.safetensors     LoRA weights, float32, by parameter name
    optimizer.safetensors   exp_avg and exp_avg_sq, float32, as "<parameter>/<key>"
    state.json              step, loss scale, best validation, fingerprint of what must not change
    manifest.json           size and sha256 of each file above; written last: without it there is no checkpoint
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import safetensors.torch

from qlora_ray.rundir import names
from qlora_ray.rundir.checkpoints import MANIFEST, newest_whole, put_aside, verify, with_manifest
from qlora_ray.storage import Folder
from qlora_ray.worker.state import MOMENTS, AdapterState


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint gives back."""

    adapter: AdapterState
    progress: dict[str, Any]  # what `save` was given
    broken: list[str]  # what is wrong with newer checkpoints


def save(run: Folder, state: AdapterState, progress: dict[str, Any], keep: int) -> str:
    """Write one checkpoint whole, read it back, then remove all older ones but the newest `keep` - 1; returns its name.

    One process calls this. Whatever moment it is killed at, the checkpoint before stays.
    """
    folder, name = run / names.CHECKPOINTS, f"step_{progress['step']:08d}"
    if folder.make().is_local:
        os.chmod(folder.path, 0o700)
    for left in folder.list():
        if left.startswith(".step_"):  # of a process that was killed while it wrote
            (folder / left).delete()
    # Objects appear whole, and a store cannot rename a folder: there the manifest, written last, makes the checkpoint.
    place = folder / (f".{name}.tmp" if folder.is_local else name)
    try:
        _write_files(place.make(), state, progress)
    except OSError:
        place.delete()  # half a checkpoint would hold the space that the next one needs
        raise
    if folder.is_local:
        if (folder / name).exists():
            put_aside(folder / name)
        place.rename(folder / name)
    verify(folder / name)
    older = [checkpoint for checkpoint in with_manifest(run) if checkpoint.name < name]
    for checkpoint in older[: max(0, len(older) - (keep - 1))]:
        checkpoint.delete()
    return name


def _write_files(folder: Folder, state: AdapterState, progress: dict[str, Any]) -> None:
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
        (folder / file).write_bytes(content)
        manifest[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())


def load_latest(run: Folder, set_aside: bool) -> Resumed | None:
    """The newest whole checkpoint of a run; None where there is none.

    With `set_aside` (one process only) the broken ones are renamed, so that they are in nobody's way.
    Raises BrokenCheckpoint.
    """
    found = newest_whole(run)
    if found is None:
        return None
    checkpoint, files, broken = found
    if set_aside:
        for newer in [c for c in with_manifest(run) if c.name > checkpoint.name]:
            put_aside(newer)
    weights = safetensors.torch.load(files["adapter.safetensors"])
    flat = safetensors.torch.load(files["optimizer.safetensors"])
    moments: dict[str, dict] = {name: {key: flat[f"{name}/{key}"] for key in MOMENTS} for name in weights}
    progress = json.loads(files["state.json"])
    step, scale = progress.pop("optimizer_step"), progress.pop("loss_scale")
    return Resumed(AdapterState(weights, moments, step, scale), progress, broken)


def _contiguous(tensors: dict) -> dict:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
