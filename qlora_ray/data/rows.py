"""Rows as training reads them: which samples each holds, and their tokens gathered from the memory-mapped parts.

cache/<fingerprint>/
    train.arrow, validation.arrow    a line per row: samples (numbers, int64), num_tokens, num_label_tokens
    prompts.json                     held-out questions with their answers
    stats.json                       DataStats, the names of the samples' entries, the chat template; written last

A sample's number counts through the sources of its split, in their order. A row of pairs holds the samples of chosen
answers, then those of the rejected ones in the same order; it is read as two rows of tokens. Where pairs share their
prompts it is one: each chosen sample is followed by its rejected one without what both begin with, as the column
num_shared says. Rows of labelled answers are as those of pairs: after the samples come those whose answers stand in the
second row of tokens behind the prompts of the first ones.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import pyarrow as pa

from qlora_ray.data.deal import Index
from qlora_ray.data.order import NO_ROW, Order
from qlora_ray.data.samples import MANIFEST
from qlora_ray.data.stats import DataStats
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.storage import Folder

STATS = "stats.json"


def find(entry: Folder) -> DataStats | None:
    """Statistics of a whole entry of rows whose samples are there too, or None."""
    if not (entry / STATS).exists():
        return None
    known = json.loads((entry / STATS).read_bytes())
    entries = {name for names in known["samples"].values() for name in names}
    whole = all((entry.parent / name / MANIFEST).exists() for name in entries)
    stats = {**known["stats"], "template_notes": tuple(known["stats"]["template_notes"])}
    return DataStats(**stats) if whole else None


def write_rows(
    entry: Folder, split: str, held: tuple[np.ndarray, np.ndarray], index: Index, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Write a split's rows. Returns the tokens of each, (R,).

    `held` is (offsets, samples): row r holds samples[offsets[r]:offsets[r+1]], with so many tokens each in it; without
    `lengths` all.
    """
    offsets, samples = held
    lengths = index.num_tokens[samples] if lengths is None else lengths
    shared = index.num_tokens[samples] - lengths
    values = (lengths, index.num_label_tokens[samples])
    sums = [np.concatenate([[0], np.cumsum(of_sample, dtype=np.int64)]) for of_sample in values]
    num_tokens, num_label_tokens = (np.diff(sum_before[offsets]) for sum_before in sums)
    numbers = pa.ListArray.from_arrays(offsets.astype(np.int32), samples.astype(np.int64))
    table = pa.table({"samples": numbers, "num_tokens": num_tokens, "num_label_tokens": num_label_tokens})
    of_samples = {"num_shared": shared.astype(np.int32), "is_desirable": index.is_desirable[samples]}
    for name, of_each in of_samples.items():
        column = pa.ListArray.from_arrays(offsets.astype(np.int32), pa.array(of_each))
        table = table.append_column(name, column)
    with (entry / f"{split}.arrow").open_to_write() as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return num_tokens


def as_pairs(offsets: np.ndarray, chosen: np.ndarray, shares_prompts: bool) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, samples) of rows of pairs: row r has the chosen samples chosen[offsets[r]:offsets[r+1]].

    The rejected sample of a pair is the one after the chosen one.
    """
    if shares_prompts:
        return 2 * offsets, np.repeat(chosen, 2) + np.tile([0, 1], len(chosen))
    sizes = np.diff(offsets)
    inside = np.arange(len(chosen)) - np.repeat(offsets[:-1], sizes)
    firsts = np.repeat(2 * offsets[:-1], sizes) + inside
    samples = np.empty(2 * len(chosen), np.int64)
    samples[firsts] = chosen
    samples[firsts + np.repeat(sizes, sizes)] = chosen + 1
    return 2 * offsets, samples


def write_stats(entry: Folder, stats: DataStats, samples: dict[str, list[str]], chat_template: str | None) -> None:
    """Close an entry of rows: from here on it is whole."""
    known = {"stats": asdict(stats), "samples": samples, "chat_template": chat_template}
    (entry / STATS).write_bytes(json.dumps(known, indent=1).encode())


def chat_template_of(entry: Folder) -> str | None:
    """The template that made the rows: fitted to the tokenizer, its date fixed. None is the tokenizer's own."""
    return json.loads((entry / STATS).read_bytes())["chat_template"]


class Rows:
    """The rows of a split. R rows; their tokens stay on the disk until gathered."""

    def __init__(self, entry: Folder, split: str):
        with pa.ipc.open_file(_local_file(entry / f"{split}.arrow")) as file:
            table = file.read_all().combine_chunks()
        samples = table["samples"].combine_chunks()
        self._offsets, self._samples = samples.offsets.to_numpy(), samples.values.to_numpy()
        self.num_tokens = table["num_tokens"].to_numpy()  # of each row, (R,)
        self.num_label_tokens = table["num_label_tokens"].to_numpy()
        self.num_samples = np.diff(self._offsets)
        known = json.loads((entry / STATS).read_bytes())
        self.pairs, self.labelled, self.shares_prompts = (
            known["stats"].get(name, False) for name in ("pairs", "labelled", "shares_prompts")
        )
        self._max_length = known["stats"]["max_length"]
        self._has_positions = known["stats"]["packed"] or self.shares_prompts
        self.rows_of_tokens = 2 if self.pairs and not self.shares_prompts else 1  # that each row is read as
        self._shared, self._is_desirable = (
            table[name].combine_chunks().values.to_numpy(zero_copy_only=False)
            for name in ("num_shared", "is_desirable")
        )
        if not self.shares_prompts:
            self._shared = np.zeros_like(self._shared)
        self._store = _Store([entry.parent / name for name in known["samples"][split]])

    def __len__(self) -> int:
        return len(self.num_tokens)

    def samples_of(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the samples in the given rows, one row after the other; NO_ROW holds none."""
        return self._samples[self._places_of(rows)]

    def _places_of(self, rows: np.ndarray) -> np.ndarray:
        """Where the samples of the given rows stand among those of the split."""
        held = [np.arange(self._offsets[row], self._offsets[row + 1]) for row in rows if row != NO_ROW]
        return np.concatenate(held) if held else np.zeros(0, np.int64)

    def gather(self, rows: np.ndarray) -> pa.Table:
        """The given rows: input_ids, labels and, where rows are packed, position_ids (list<int32> each).

        Positions start at 0 with each sample; or, where it shares its beginning with the one before it, where that
        ends. A sample's first token is never a label. NO_ROW becomes a row without labels, which is read but never
        trained on. Of pairs also `places` (list<int64>): for each sample its place among those of the split, NO_ROW
        where it does not count; and `is_rejected` and `is_desirable` (list<bool>).
        """
        taken = np.where(rows == NO_ROW, 0, rows)
        per_row = np.repeat(self.num_samples[taken] // self.rows_of_tokens, self.rows_of_tokens)  # of rows of tokens
        places = self._places_of(taken)
        shared = self._shared[places]
        ids, is_trained, starts = _joined([self._piece(place) for place in places.tolist()])
        firsts = np.concatenate([[0], np.cumsum(per_row)])
        offsets = starts[firsts].astype(np.int32)
        counts = np.repeat(rows != NO_ROW, self.rows_of_tokens)  # of rows of tokens
        is_trained &= np.repeat(counts, np.diff(offsets))
        labels = np.where(is_trained, ids, IGNORE_INDEX).astype(np.int32)
        positions = (np.arange(len(ids)) - np.repeat(starts[:-1] - shared, np.diff(starts))).astype(np.int32)
        columns = {"input_ids": ids, "labels": labels} | ({"position_ids": positions} if self._has_positions else {})
        table = pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})
        if not self.pairs:
            return table
        of_samples = {
            "places": np.where(np.repeat(counts, per_row), places, NO_ROW).astype(np.int64),
            "is_rejected": self._is_rejected(per_row),
            "is_desirable": self._is_desirable[places],
        }
        for name, values in of_samples.items():
            table = table.append_column(name, pa.ListArray.from_arrays(firsts.astype(np.int32), pa.array(values)))
        return table

    def halves(self, rows: np.ndarray) -> tuple[pa.Table, pa.Table]:
        """The chosen and the rejected samples of the given rows of pairs, each whole: input_ids and labels."""
        per_row = np.repeat(self.num_samples[rows] // self.rows_of_tokens, self.rows_of_tokens)
        numbers, is_rejected = self.samples_of(rows), self._is_rejected(per_row)
        return self._alone(numbers[~is_rejected]), self._alone(numbers[is_rejected])

    def _alone(self, numbers: np.ndarray) -> pa.Table:
        ids, is_trained, starts = _joined([self._store.sample(number) for number in numbers.tolist()])
        labels = np.where(is_trained, ids, IGNORE_INDEX).astype(np.int32)
        columns = (pa.ListArray.from_arrays(starts.astype(np.int32), values) for values in (ids, labels))
        return pa.table(list(columns), names=["input_ids", "labels"])

    def _piece(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and span edges of what a row has of the sample at a place of the split."""
        ids, spans = self._store.sample(int(self._samples[place]))
        if self.labelled:
            row = int(np.searchsorted(self._offsets, place, side="right")) - 1
            half = int(self.num_samples[row]) // 2
            if place - self._offsets[row] >= half:
                return self._with_prompt_of(int(self._samples[place - half]), ids, spans)
        first = int(self._shared[place])
        return ids[first:], spans - first

    def _with_prompt_of(self, number: int, ids: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A sample's answer behind the prompt of sample `number`."""
        asked, of_asked = self._store.sample(number)
        start, shift = int(of_asked[0]), int(of_asked[0]) - int(spans[0])
        joined = np.concatenate([asked[:start], ids[spans[0] :]])[: self._max_length]
        edges = np.minimum(spans + shift, len(joined)).reshape(-1, 2)
        return joined, edges[edges[:, 0] < edges[:, 1]].ravel()

    def _is_rejected(self, per_row: np.ndarray) -> np.ndarray:
        """Whether each sample of rows of tokens, which have so many, is the rejected one of its pair."""
        # One after the other in a row of both, else row by row of tokens.
        count = np.arange(per_row.sum()) if self.shares_prompts else np.repeat(np.arange(len(per_row)), per_row)
        return count % 2 == 1


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids of pieces one after the other, whether each is trained on, and where each piece begins, and the end."""
    starts = np.cumsum([0, *(len(ids) for ids, _ in pieces)])
    ids = np.concatenate([ids for ids, _ in pieces])
    edges = np.concatenate([spans + start for (_, spans), start in zip(pieces, starts[:-1], strict=True)])
    edge = np.zeros(len(ids) + 1, np.int32)
    np.add.at(edge, edges[0::2], 1)
    np.add.at(edge, edges[1::2], -1)
    return ids, np.cumsum(edge[:-1]) > 0, starts


@lru_cache(maxsize=4)
def open_rows(entry: Folder, split: str) -> Rows:
    """The rows of a split; opened once in a process."""
    return Rows(entry, split)


def sample_digest(rows: Rows, order: Order, step: int) -> str:
    """16 hex digits over the samples that optimizer step `step` (from 0) reads, in the order of the epoch.

    sha256 of their numbers as little-endian int64: the same for any number of workers and any micro-batch size.
    """
    numbers = rows.samples_of(order.rows_of_step(step).T.ravel())
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]


class _Store:
    """Samples of several entries by number."""

    def __init__(self, entries: list[Folder]):
        manifests = [json.loads((entry / MANIFEST).read_bytes()) for entry in entries]
        parts = [
            (entry / name, count)
            for entry, known in zip(entries, manifests, strict=True)
            for name, _, count in known["parts"]
        ]
        self._files = [file for file, _ in parts]
        self._starts = np.cumsum([0, *(count for _, count in parts)])  # number of each part's first sample
        self._open: dict[int, tuple[np.ndarray, list[tuple[np.ndarray, ...]]]] = {}

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and span edges (start, end, start, end, ...) of a sample: views of the mapped file."""
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        if part not in self._open:
            self._open[part] = _open_part(self._files[part])
        firsts, batches = self._open[part]
        local = number - int(self._starts[part])
        batch = int(np.searchsorted(firsts, local, side="right")) - 1
        id_offsets, ids, span_offsets, spans = batches[batch]
        i = local - int(firsts[batch])
        return ids[id_offsets[i] : id_offsets[i + 1]], spans[span_offsets[i] : span_offsets[i + 1]]


def _open_part(file: Folder) -> tuple[np.ndarray, list[tuple[np.ndarray, ...]]]:
    reader = pa.ipc.open_file(_local_file(file))
    batches = []
    firsts = [0]
    for i in range(reader.num_record_batches):
        batch = reader.get_batch(i)
        columns = [batch.column(name) for name in ("input_ids", "spans")]
        batches.append(tuple(array.to_numpy() for c in columns for array in (c.offsets, c.values)))
        firsts.append(firsts[-1] + batch.num_rows)
    return np.array(firsts[:-1]), batches


def ids_of_part(file: Folder) -> Iterator[np.ndarray]:
    """The token ids of a part, batch by batch: views of the mapped file."""
    for _, ids, _, _ in _open_part(file)[1]:
        yield ids


def _local_file(file: Folder):
    """A cache file memory-mapped; from an object store it is first copied to this machine's temporary folder."""
    if file.is_local:
        return pa.memory_map(file.path)
    copies = os.path.join(tempfile.gettempdir(), f"qlora_ray-{os.getuid()}", file.parent.name)
    copy = os.path.join(copies, file.name)
    if not os.path.exists(copy) or os.path.getsize(copy) != file.size():
        os.makedirs(copies, mode=0o700, exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(dir=copies, delete=False) as whole,
            file.filesystem.open_input_stream(file.path) as s,
        ):
            while block := s.read(1 << 22):
                whole.write(block)
        os.replace(whole.name, copy)
    return pa.memory_map(copy)
