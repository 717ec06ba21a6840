"""How often each token comes in what was tokenized, counted once; and tokens that the base has no row for. No torch."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from qlora_ray.data.rows import ids_of_part
from qlora_ray.data.samples import Samples
from qlora_ray.errors import ConfigError

COUNTS = "token_counts.npy"  # in a source's entry: (largest id + 1,) int64
MOST_SHOWN = 5


def token_counts(samples: tuple[Samples, ...]) -> np.ndarray:
    """How often each token comes in all samples of these sources, by id: (largest id + 1,) int64."""
    each = [_counts_of(one) for one in samples]
    total = np.zeros(max((len(counts) for counts in each), default=0), np.int64)
    for counts in each:
        total[: len(counts)] += counts
    return total


def refuse_without_row(counts: np.ndarray, num_rows: int, open_tokenizer: Callable[[], Any], key: str) -> None:
    """Raise ConfigError for a token of the data beyond the rows of the base's embedding."""
    used = [int(token) for token in np.flatnonzero(counts[num_rows:]) + num_rows]
    if used:
        text_of = open_tokenizer().convert_ids_to_tokens
        named = ", ".join(f"{text_of(token)!r} (id {token})" for token in used[:MOST_SHOWN])
        more = f" and {len(used) - MOST_SHOWN:,} more" if len(used) > MOST_SHOWN else ""
        raise ConfigError(
            f"{key}: its embedding has {num_rows:,} rows, and the data has tokens beyond them: {named}{more}. Add them "
            "to model.new_tokens, which trains rows for them, or use the tokenizer that belongs to the base."
        )


def note_untrained(counts: np.ndarray, untrained: frozenset[int], open_tokenizer: Callable[[], Any]) -> str | None:
    """What to tell of tokens of the data whose rows no training of the base has touched; None where there are none."""
    found = sorted((token for token in untrained if token < len(counts) and counts[token]), key=lambda t: -counts[t])
    if not found:
        return None
    text_of = open_tokenizer().convert_ids_to_tokens
    named = ", ".join(f"{text_of(token)!r} ({counts[token]:,}x)" for token in found[:MOST_SHOWN])
    more = f" and {len(found) - MOST_SHOWN:,} more" if len(found) > MOST_SHOWN else ""
    return (
        f"The data has tokens that the base was never trained on: {named}{more}. A LoRA leaves their rows as they are; "
        "model.new_tokens trains them."
    )


def _counts_of(samples: Samples) -> np.ndarray:
    kept = samples.entry / COUNTS
    if kept.exists():
        return np.load(io.BytesIO(kept.read_bytes()))
    counts = np.zeros(0, np.int64)
    for name, _, _ in samples.parts:
        for ids in ids_of_part(samples.entry / name):
            of_batch = np.bincount(ids, minlength=len(counts))
            of_batch[: len(counts)] += counts
            counts = of_batch
    content = io.BytesIO()
    np.save(content, counts)
    kept.write_bytes(content.getvalue())
    return counts
