"""Which checkpoints a run directory holds, and whether they are whole. Imports no torch: doors answer at once."""

import hashlib
import json
import re

from qlora_ray.errors import BrokenCheckpoint
from qlora_ray.rundir import names
from qlora_ray.storage import Folder

NAME = re.compile(r"step_(\d{8})")
MANIFEST = "manifest.json"
FILES = {"adapter.safetensors", "optimizer.safetensors", "state.json"}


def with_manifest(run: Folder) -> list[Folder]:
    """The checkpoints that have a manifest, oldest first."""
    folder = run / names.CHECKPOINTS
    return [folder / name for name in folder.list() if NAME.fullmatch(name) and (folder / name / MANIFEST).exists()]


def verify(checkpoint: Folder) -> dict[str, bytes]:
    """The files of a checkpoint, each checked against the manifest. Raises BrokenCheckpoint."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        listed = {file: (entry["bytes"], entry["sha256"]) for file, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{checkpoint.path}: its manifest is unreadable ({error}).") from None
    files = {}
    for file, (size, digest) in listed.items():
        try:
            content = (checkpoint / file).read_bytes()
        except OSError as error:
            raise BrokenCheckpoint(f"{checkpoint.path}: {file} cannot be read ({error}).") from None
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise BrokenCheckpoint(f"{checkpoint.path}: {file} is not what was written (sha256 differs).")
        files[file] = content
    if FILES - files.keys():
        raise BrokenCheckpoint(f"{checkpoint.path}: its manifest does not list every file.")
    return files


def newest_whole(run: Folder) -> tuple[Folder, dict[str, bytes], list[str]] | None:
    """The newest whole checkpoint, its files, and what is wrong with newer ones; None where there is no checkpoint.

    Raises BrokenCheckpoint when there are checkpoints, and none is whole.
    """
    broken: list[str] = []
    for checkpoint in reversed(with_manifest(run)):
        try:
            return checkpoint, verify(checkpoint), broken
        except BrokenCheckpoint as error:
            broken.append(str(error))
    if broken:
        raise BrokenCheckpoint(f"{' '.join(broken)} No whole checkpoint is left: start a new run.")
    return None


def put_aside(checkpoint: Folder) -> None:
    """Take what is no whole checkpoint out of the way: it stays to be looked at, as broken-step_<step>."""
    parent, name = checkpoint.path.rsplit("/", 1)
    aside = Folder(checkpoint.filesystem, f"{parent}/broken-{name}")
    aside.delete()
    if checkpoint.is_local:
        checkpoint.rename(aside)
    else:  # object stores cannot rename a folder
        (checkpoint / MANIFEST).rename(aside)
