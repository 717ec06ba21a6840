"""Pickled weights (pytorch_model.bin), rewritten once as safetensors in the hub's cache of assets; none is ever run.

<HF_ASSETS_CACHE>/qlora_ray/safetensors/<digest of the folder's path and files>/
    *.safetensors       a file for each pickled one, and their index
    *                   links to the other files of the folder, so that transformers loads the whole

PyTorch reads numbers and names out of the pickle and refuses everything else (torch.load with weights_only).
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_ray.errors import ConfigError
from qlora_ray.model.tensors import BYTES, DTYPES, write_tensors

if TYPE_CHECKING:
    import torch

ONE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # as transformers has named them
NAMES = {name: stored for stored, name in DTYPES.items()}
GIB = 2**30
logger = logging.getLogger(__name__)
Layout = dict[str, tuple[str, tuple[int, ...]]]  # stored dtype and shape by name, as write_tensors takes it


def pickled_files(folder: Path, key: str) -> list[Path]:
    """The pickled files that transformers would load from a folder. Raises ConfigError for a damaged index."""
    if (folder / ONE).is_file():
        return [folder / ONE]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        files = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {INDEX} is damaged ({error}). Download or copy it again.") from None
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{key}: {file.name} is missing from the folder. Download or copy it again.")
    return files


def converted_folder(folder: Path, key: str) -> Path:
    """The folder as transformers loads it without a pickle; converted first where no process has done it yet.

    Safe for several processes at once: one converts, the others wait. Raises ConfigError for what cannot be converted.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    files = pickled_files(folder, key)
    try:
        target = Path(constants.HF_ASSETS_CACHE) / "qlora_ray" / "safetensors" / _digest(folder, files)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(f"{target}.lock"):
                if not target.exists():
                    _convert(folder, files, target, key)
    except OSError as error:
        raise ConfigError(
            f"{key}: its pickled weights cannot be converted: {error}. The copy goes to the hub's cache of assets: "
            "free space there, or set HF_ASSETS_CACHE to a folder that can be written to."
        ) from error
    return target


def _digest(folder: Path, files: list[Path]) -> str:
    """Of what the copy depends on: where the folder is, its pickled files as they are now, and the others' names."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = str(folder.resolve()), stats, sorted(path.name for path in _others(folder, files))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _others(folder: Path, files: list[Path]) -> list[Path]:
    return [path for path in folder.iterdir() if path not in files and path.name != INDEX]


def _convert(folder: Path, files: list[Path], target: Path, key: str) -> None:
    """Write the copy beside its place, and rename it into it. The caller holds the lock."""
    for left in target.parent.glob(f"{target.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(left)
    layouts = {file: _layout(file, _open(file, key), key) for file in files}
    size = sum(_num_bytes(layout) for layout in layouts.values())
    logger.warning(
        "%s: its weights are pickled; %s MiB of them are converted once to safetensors, in %s",
        key, f"{size / 2**20:,.0f}", target,
    )  # fmt: skip
    if size > (free := shutil.disk_usage(target.parent).free):
        raise OSError(f"{size / GIB:.1f} GiB are needed in {target.parent}, {free / GIB:.1f} are free")
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        weight_map: dict[str, str] = {}
        for number, (file, layout) in enumerate(layouts.items(), start=1):
            name = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            with (temporary / name).open("wb") as stream:
                write_tensors(stream, layout, _tensors(file, key))
                stream.flush()
                os.fsync(stream.fileno())
            weight_map |= dict.fromkeys(layout, name)
        if len(files) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        for path in _others(folder, files):
            (temporary / path.name).symlink_to(path.absolute())
        temporary.rename(target)


def _open(file: Path, key: str) -> dict[str, "torch.Tensor"]:
    """Names and tensors of one file, mapped from the disk where its format allows. Raises ConfigError."""
    import torch

    try:
        # Files of torch before 1.6 are no zip archives and cannot be mapped: such a one is read whole.
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (
        torch.serialization.pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, TypeError,
        AttributeError,
    ) as error:  # fmt: skip  # what the reader meets in a damaged or hostile file
        reason = _reason(str(error))
        raise ConfigError(
            f"{key}: {file.name} cannot be read as weights alone ({reason}); a pickle that wants more could run "
            "anything, and is not run. Convert it where you trust it: save_pretrained(..., safe_serialization=True)."
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{key}: {file.name} holds a {type(loaded).__name__}, not tensors by name.")
    return loaded


def _layout(file: Path, tensors: dict[str, "torch.Tensor"], key: str) -> Layout:
    """Stored dtype and shape of each. Raises ConfigError for what is no plain tensor."""
    import torch

    layout: Layout = {}
    for name, tensor in tensors.items():
        is_plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        stored = NAMES.get(str(tensor.dtype).removeprefix("torch.")) if is_plain else None
        if stored is None or not isinstance(name, str):
            what = tensor.dtype if is_plain else type(tensor).__name__
            raise ConfigError(
                f"{key}: {file.name} holds {name!r} ({what}), which is no plain tensor of a model's weights. Convert "
                "the file where it was made: save_pretrained(..., safe_serialization=True)."
            )
        layout[name] = stored, tuple(tensor.shape)
    return layout


def _tensors(file: Path, key: str) -> Iterator["torch.Tensor"]:
    yield from _open(file, key).values()


def _reason(message: str) -> str:
    """The line of PyTorch's message that says what the pickle asks for."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line or "nsupported" in line), (lines or ["damaged"])[0])


def _num_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * BYTES[stored] for stored, shape in layout.values())
