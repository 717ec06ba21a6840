"""Rows to tensors: what one forward pass reads."""

# B rows in a micro-batch, T tokens per row
from collections.abc import Iterator

import pyarrow as pa
import torch

from qlora_ray.data.tokenize import IGNORE_INDEX

PAD_TO_MULTIPLE_OF = 8  # keeps matrix units busy, and the number of different shapes small


def to_tensors(rows: pa.Table, pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Pad rows on the right to a common length: input_ids, attention_mask, labels, each (B, T) int64."""
    ids, labels = rows["input_ids"].to_pylist(), rows["labels"].to_pylist()
    longest = max(map(len, ids))
    width = -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
    batch = {
        "input_ids": [row + [pad_token_id] * (width - len(row)) for row in ids],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in ids],
        "labels": [row + [IGNORE_INDEX] * (width - len(row)) for row in labels],
    }
    return {name: torch.tensor(values).to(device, non_blocking=True) for name, values in batch.items()}


def slices(table: pa.Table, size: int) -> Iterator[pa.Table]:
    """Consecutive tables of `size` rows; the last may be shorter."""
    for start in range(0, table.num_rows, size):
        yield table.slice(start, size)
