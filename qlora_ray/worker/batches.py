"""Rows to tensors: what one forward pass reads."""

# B rows in a micro-batch, T tokens per row
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from qlora_ray.data.order import NO_ROW
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.planning.plan import PAD_TO_MULTIPLE_OF


def to_tensors(rows: pa.Table, pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The model's inputs and the labels of a micro-batch, padded on the right: each (B, T) int64, where not said else.

    input_ids and labels; label_places, the places whose next token is trained on, counted through all rows, (L,) int64;
    for packed rows position_ids, which start at 0 with each sample and with the padding: without
    a mask, transformers keeps attention within each such run (transformers/masking_utils.py,
    find_packed_sequence_indices). Also sample_borders: where these runs begin, counted through all rows, and the end,
    (S + 1,) int32 on the CPU. For others, and where each packed row holds one sample, attention_mask. Of P pairs also
    places of the chosen and then of the rejected answers' samples, (2 P,); label_counts, how many of the label_places
    each answer has, as they come in the rows, (2 P,), and answer_order, where the answers of `places` are among these.
    """
    offsets = rows["input_ids"].combine_chunks().offsets.to_numpy()
    lengths = np.diff(offsets)
    width = -(-int(lengths.max()) // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
    is_token = np.arange(width) < lengths[:, None]  # (B, T)
    batch = {
        name: np.full(is_token.shape, fill, np.int64)
        for name, fill in (("input_ids", pad_token_id), ("labels", IGNORE_INDEX))
    }
    is_packed = "position_ids" in rows.column_names and _has_several_samples(rows)
    if is_packed:
        batch["position_ids"] = np.arange(width) - lengths[:, None]  # of the padding; the rest follows
    else:
        batch["attention_mask"] = is_token.astype(np.int64)
    for name in rows.column_names:
        if name in batch:
            values = rows[name].combine_chunks()
            batch[name][is_token] = values.values.to_numpy()[values.offsets[0].as_py() : values.offsets[-1].as_py()]
    predicts = np.zeros(is_token.shape, bool)
    predicts[:, :-1] = batch["labels"][:, 1:] != IGNORE_INDEX
    batch["label_places"] = np.flatnonzero(predicts)
    if "places" in rows.column_names:
        starts_sample = np.zeros(is_token.shape, bool)
        starts_sample[:, 0] = True
        if is_packed:
            starts_sample |= is_token & (batch["position_ids"] == 0)
        batch |= _answers(rows, (np.cumsum(starts_sample) - 1)[batch["label_places"]])
    tensors = {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in batch.items()}
    if is_packed:
        borders = np.append(np.flatnonzero(batch["position_ids"] == 0), is_token.size)
        tensors["sample_borders"] = torch.from_numpy(borders.astype(np.int32))
    return tensors


def _answers(rows: pa.Table, sample_of_label: np.ndarray) -> dict[str, np.ndarray]:
    """places, label_counts and answer_order of `to_tensors`; samples are counted through all rows."""
    column = rows["places"].combine_chunks()
    places = column.values.to_numpy()[column.offsets[0].as_py() : column.offsets[-1].as_py()]
    row = np.repeat(np.arange(rows.num_rows), np.diff(column.offsets.to_numpy()))
    is_answer = places != NO_ROW
    counts = np.bincount(sample_of_label, minlength=len(places))[is_answer]
    side = row[is_answer] % 2
    order = np.concatenate([np.flatnonzero(side == 0), np.flatnonzero(side == 1)])
    return {"places": places[is_answer][order], "label_counts": counts, "answer_order": order}


def _has_several_samples(rows: pa.Table) -> bool:
    positions = rows["position_ids"].combine_chunks()
    values = positions.values.to_numpy()[positions.offsets[0].as_py() : positions.offsets[-1].as_py()]
    return int((values == 0).sum()) > rows.num_rows


def slices(table: pa.Table, size: int) -> Iterator[pa.Table]:
    """Consecutive tables of `size` rows; the last may be shorter."""
    for start in range(0, table.num_rows, size):
        yield table.slice(start, size)
