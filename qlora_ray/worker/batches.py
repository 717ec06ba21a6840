"""Rows to tensors: what one forward pass reads."""

# B rows in a micro-batch, T tokens per row
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from qlora_ray.data.order import NO_ROW
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.planning.sharing import PAD_TO_MULTIPLE_OF
from qlora_ray.worker.seat import Seat

WHOLE = Seat(0, 1)


def to_tensors(
    rows: pa.Table, pad_token_id: int, device: torch.device, seat: Seat = WHOLE
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The model's inputs and the labels of a micro-batch, padded on the right: each (B, T) int64, where not said else.

    input_ids and labels; label_places, the places whose next token is trained on, counted through all rows, (L,) int64.
    For packed rows position_ids, which start at 0 with each sample and with the padding: without a mask, transformers
    keeps attention within each such run (transformers/masking_utils.py, find_packed_sequence_indices). Also
    sample_borders: where these runs begin, counted through all rows, and the end, (S + 1,) int32 on the CPU. A run that
    begins at another position goes on from as many first tokens of the run before: num_shared, (S,) int32 on the CPU,
    if there are such. For others, and where each packed row holds one sample, attention_mask. Of P pairs also places of
    the chosen and then of the rejected answers' samples, (2 P,); label_counts, how many of the label_places each answer
    has, as they come in the rows, (2 P,); answer_order, where the answers of `places` are among these; and
    is_desirable, (2 P,) bool. Where workers share rows, what `_part` leaves of it to this
    one.
    """
    offsets = rows["input_ids"].combine_chunks().offsets.to_numpy()
    lengths = np.diff(offsets)
    width, whole_width = (
        -(-int(lengths.max()) // multiple) * multiple
        for multiple in (PAD_TO_MULTIPLE_OF * seat.num_parts, PAD_TO_MULTIPLE_OF)
    )
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
    borders = np.flatnonzero(_starts(batch["position_ids"])) if is_packed else None
    positions = None if borders is None else batch["position_ids"].flat[borders]
    if seat.num_parts > 1:
        batch = _part(batch, seat, whole_width)
    tensors = {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in batch.items()}
    if borders is not None:
        tensors["sample_borders"] = torch.from_numpy(np.append(borders, is_token.size).astype(np.int32))
        if positions is not None and positions.any():
            tensors["num_shared"] = torch.from_numpy(positions.astype(np.int32))
    return tensors


def _starts(positions: np.ndarray) -> np.ndarray:
    """Whether a run of positions begins at a token: (B, T)."""
    return np.diff(positions, axis=1, prepend=-2) != 1


def _part(batch: dict[str, np.ndarray], seat: Seat, whole_width: int) -> dict[str, np.ndarray]:
    """This worker's S = T / N tokens of each row: input_ids, position_ids and targets, each (B, S) int64.

    targets are the labels of the next tokens, also of one that the next worker has. label_places are counted through
    these tokens. Dropout counts as if nobody shared rows, which then are `whole_width` wide: token_numbers, (B, S)
    int32, say where the tokens stand in all rows, and place_numbers, (L,) int32, where the places do among all places.
    Borders of samples stay those of the whole rows, which attention sees.
    """
    count, width = batch["input_ids"].shape
    length = width // seat.num_parts
    own = slice(seat.part * length, (seat.part + 1) * length)
    ends = np.full((count, 1), IGNORE_INDEX)
    whole = {
        "input_ids": batch["input_ids"],
        "position_ids": batch.get("position_ids", np.broadcast_to(np.arange(width), (count, width))),
        "targets": np.concatenate([batch["labels"][:, 1:], ends], 1),
    }
    part = {name: np.ascontiguousarray(values[:, own]) for name, values in whole.items()}
    part["token_numbers"] = (np.arange(count)[:, None] * whole_width + np.arange(width)[own]).astype(np.int32)
    row, column = np.divmod(batch["label_places"], width)
    is_own = column // length == seat.part
    part["label_places"] = row[is_own] * length + column[is_own] - own.start
    part["place_numbers"] = np.flatnonzero(is_own).astype(np.int32)
    if not is_own.any():  # one place, whose target counts nothing: else the head would compute all
        part |= {"label_places": np.zeros(1, np.int64), "place_numbers": np.zeros(1, np.int32)}
    return part


def _answers(rows: pa.Table, sample_of_label: np.ndarray) -> dict[str, np.ndarray]:
    """places, label_counts and answer_order of `to_tensors`; samples are counted through all rows."""
    places, is_rejected = (_flat(rows[name]) for name in ("places", "is_rejected"))
    is_answer = places != NO_ROW
    counts = np.bincount(sample_of_label, minlength=len(places))[is_answer]
    assert counts.sum() == len(sample_of_label), "a token outside of answers is trained on"
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
