"""Tokens that a base was never trained on, as its embedding tells; and what ends its answers. Loads no model."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qlora_ray.config import ModelConfig
from qlora_ray.model.facts import weight_files
from qlora_ray.model.tensors import TensorFiles

if TYPE_CHECKING:
    import torch

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|embed)\.weight$")
LEAST = 1e-16  # a row below it was never moved (unsloth's bound)
# Bytes that no UTF-8 text holds: where they are tokens, nothing has trained them.
NEVER_IN_TEXT = (0xC0, 0xC1, *range(0xF5, 0x100))
SAME_DIRECTION = 0.95  # cosine
ROWS_AT_ONCE = 8192


def generation_config_of(folder: str, model: ModelConfig) -> Any:
    """What stands for a model where only its generation_config is asked for. Raises ConfigError."""
    from transformers import GenerationConfig

    from qlora_ray.model.architecture import config_of

    if (Path(folder) / "generation_config.json").is_file():
        return SimpleNamespace(generation_config=GenerationConfig.from_pretrained(folder))
    config = config_of(folder, model.trust_remote_code, model.factory)
    return SimpleNamespace(generation_config=GenerationConfig.from_model_config(config))


def untrained_tokens(folder: str, tokenizer: Any) -> frozenset[int] | None:
    """Ids of the tokenizer whose row of the input embedding is missing or untrained; None where none is found.

    Untrained is a row of zeros, and one like those of the bytes that no text holds ("Fishing for Magikarp",
    arXiv:2405.05417): as short as they are, or where input and output share the matrix, of their direction.
    """
    files = TensorFiles(weight_files(Path(folder), f"model.base_model={folder}"), f"model.base_model={folder}")
    found = [name for name, entry in files.entries.items() if EMBEDDING.search(name) and len(entry.shape) == 2]
    if len(found) != 1 or not files.entries[found[0]].dtype.startswith(("F", "BF")):
        return None
    rows = files.read(found[0])  # (V, H)
    vocabulary = tokenizer.get_vocab()
    # Named as GPT-2's byte-level vocabularies have them, or as SentencePiece's byte fallback.
    names = [name for byte in NEVER_IN_TEXT for name in (chr(byte), f"<0x{byte:02X}>")]
    never = [vocabulary[name] for name in names if name in vocabulary]
    untrained = _untrained_rows(rows, [token for token in never if token < len(rows)])
    return frozenset(untrained) | frozenset(range(len(rows), len(tokenizer)))


def _untrained_rows(rows: "torch.Tensor", never: list[int]) -> list[int]:
    import torch

    norms = torch.cat([block.float().norm(dim=1) for block in rows.split(ROWS_AT_ONCE)])  # (V,)
    untrained = norms <= LEAST
    reference = rows[never].float()
    reference = reference[reference.norm(dim=1) > LEAST]
    if len(reference) < 2:
        return torch.nonzero(untrained).ravel().tolist()
    direction = torch.nn.functional.normalize(reference, dim=1).mean(0)
    if direction.norm() > SAME_DIRECTION:
        along = torch.cat([block.float() @ direction for block in rows.split(ROWS_AT_ONCE)])
        untrained |= along > SAME_DIRECTION * norms * direction.norm()
    elif (longest := reference.norm(dim=1).max()) < norms.median() / 2:
        untrained |= norms <= longest
    return torch.nonzero(untrained).ravel().tolist()
