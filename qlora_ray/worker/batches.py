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

    input_ids and labels; label_places, the places whose next token is trained on, counted through all rows, (L,) int64.
    For packed rows position_ids, which start at 0 with each sample and with the padding: without a mask, transformers
    keeps attention within each such run (transformers/masking_utils.py, find_packed_sequence_indices). Also
    sample_borders: where these runs begin, counted through all rows, and the end, (S + 1,) int32 on the CPU. A run that
    begins at another position goes on from as many first tokens of the run before: num_shared, (S,) int32 on the CPU,
    if there are such. For others, and where each packed row holds one sample, attention_mask. Of P pairs also places of
    the chosen and then of the rejected answers' samples, (2 P,); label_counts, how many of the label_places each answer
    has, as they come in the rows, (2 P,); answer_order, where the answers of `places` are among these; and
    is_desirable, (2 P,) bool.
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
            batch[name][is_token] = _flat(rows[name])
    predicts = np.zeros(is_token.shape, bool)
    predicts[:, :-1] = batch["labels"][:, 1:] != IGNORE_INDEX
    batch["label_places"] = np.flatnonzero(predicts)
    if "places" in rows.column_names:
        starts_sample = _starts(batch["position_ids"]) & is_token if is_packed else np.eye(1, width, dtype=bool)
        starts_sample = np.broadcast_to(starts_sample, is_token.shape)
        batch |= _answers(rows, (np.cumsum(starts_sample) - 1)[batch["label_places"]])
    tensors = {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in batch.items()}
    if is_packed:
        starts = np.flatnonzero(_starts(batch["position_ids"]))
        tensors["sample_borders"] = torch.from_numpy(np.append(starts, is_token.size).astype(np.int32))
        num_shared = batch["position_ids"].flat[starts].astype(np.int32)
        if num_shared.any():
            tensors["num_shared"] = torch.from_numpy(num_shared)
    return tensors


def _starts(positions: np.ndarray) -> np.ndarray:
    """Whether a run of positions begins at a token: (B, T)."""
    return np.diff(positions, axis=1, prepend=-2) != 1


def _answers(rows: pa.Table, sample_of_label: np.ndarray) -> dict[str, np.ndarray]:
    """places, label_counts and answer_order of `to_tensors`; samples are counted through all rows."""
    places, is_rejected = (_flat(rows[name]) for name in ("places", "is_rejected"))
    is_answer = places != NO_ROW
    counts = np.bincount(sample_of_label, minlength=len(places))[is_answer]
    order = np.argsort(is_rejected[is_answer], kind="stable")
    is_desirable = _flat(rows["is_desirable"])[is_answer][order]
    places = places[is_answer][order]
    return {"places": places, "label_counts": counts, "answer_order": order, "is_desirable": is_desirable}


def _has_several_samples(rows: pa.Table) -> bool:
    return int((np.diff(_flat(rows["position_ids"]), prepend=-2) != 1).sum()) > rows.num_rows


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a column of lists, one row after the other."""
    lists = column.combine_chunks()
    values = lists.values.to_numpy(zero_copy_only=False)
    return values[lists.offsets[0].as_py() : lists.offsets[-1].as_py()]


def apart(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows of tokens of pairs or labelled answers, which come by two: the first and the second ones."""
    return table.take(np.arange(0, table.num_rows, 2)), table.take(np.arange(1, table.num_rows, 2))


def slices(table: pa.Table, size: int) -> Iterator[pa.Table]:
    """Consecutive tables of `size` rows; the last may be shorter."""
    for start in range(0, table.num_rows, size):
        yield table.slice(start, size)
