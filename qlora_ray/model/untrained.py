"""Tokens that a base was never trained on, as its embedding tells; and what ends its answers. Loads no model."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qlora_ray.model.facts import weight_files
from qlora_ray.model.tensors import DTYPES, Entry, read_header

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embed)\.weight$")
# A row that nothing ever moved: zero or next to it (unsloth's bound), or the same as another's.
LEAST = 1e-16
BYTES_LOOKED_AT = 8  # at the start, the middle and the end of a row


def generation_config_of(folder: str) -> Any:
    """What stands for a model where only its generation_config is asked for."""
    from transformers import AutoConfig, GenerationConfig

    if (Path(folder) / "generation_config.json").is_file():
        return SimpleNamespace(generation_config=GenerationConfig.from_pretrained(folder))
    config = AutoConfig.from_pretrained(folder)
    return SimpleNamespace(generation_config=GenerationConfig.from_model_config(config))


def untrained_tokens(folder: str, tokenizer: Any) -> frozenset[int] | None:
    """Ids of the tokenizer whose row of the input embedding is missing or untrained; None where none is found.

    An embedding that has been trained moves every row that text uses, so that no two stay equal (arXiv:2405.05417).
    """
    entries: dict[str, Entry] = {}
    for file in weight_files(Path(folder), f"model.base_model={folder}"):
        entries |= read_header(file, f"model.base_model={folder}")
    found = [entry for name, entry in entries.items() if EMBEDDING.search(name) and len(entry.shape) == 2]
    if len(found) != 1 or not found[0].dtype.startswith(("F", "BF")):
        return None
    missing = range(found[0].shape[0], len(tokenizer))
    return frozenset(_untrained_rows(found[0])) | frozenset(missing)


def _untrained_rows(entry: Entry) -> list[int]:
    import numpy as np
    import torch

    num_rows, width = entry.shape[0], entry.size // entry.shape[0]
    matrix = np.memmap(entry.file, np.uint8, "r", entry.offset, (num_rows, width))
    middle = width // 2 // BYTES_LOOKED_AT * BYTES_LOOKED_AT
    pieces = [matrix[:, start : start + BYTES_LOOKED_AT] for start in (0, middle, width - BYTES_LOOKED_AT)]
    looked_at = np.ascontiguousarray(np.concatenate(pieces, axis=1))  # (rows, 24) bytes
    values = torch.from_numpy(looked_at).view(getattr(torch, DTYPES[entry.dtype]))
    is_zero = (values.float().abs().amax(1) <= LEAST).numpy()
    _, group, count = np.unique(looked_at, axis=0, return_inverse=True, return_counts=True)
    return np.flatnonzero(is_zero | (count[group.ravel()] > 1)).tolist()
