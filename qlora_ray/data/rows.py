"""Rows as training reads them: which samples each holds, and their tokens gathered from the memory-mapped parts.

cache/<fingerprint>/
    train.arrow, validation.arrow    a line per row: samples (numbers, int64), num_tokens, num_label_tokens
    prompts.json                     held-out questions with their answers
    stats.json                       DataStats, the names of the samples' entries, the chat template; written last

A sample's number counts through the sources of its split, in their order. A row of pairs holds the samples of chosen
answers, then those of the rejected ones in the same order; it is read as two rows of tokens.
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


def write_rows(entry: Folder, split: str, offsets: np.ndarray, samples: np.ndarray, index: Index) -> np.ndarray:
    """Write a split's rows: row r holds samples[offsets[r]:offsets[r+1]]. Returns the tokens of each row, (R,)."""
    values = (index.num_tokens[samples], index.num_label_tokens[samples])
    sums = [np.concatenate([[0], np.cumsum(of_sample, dtype=np.int64)]) for of_sample in values]
    num_tokens, num_label_tokens = (np.diff(sum_before[offsets]) for sum_before in sums)
    numbers = pa.ListArray.from_arrays(offsets.astype(np.int32), samples.astype(np.int64))
    table = pa.table({"samples": numbers, "num_tokens": num_tokens, "num_label_tokens": num_label_tokens})
    with (entry / f"{split}.arrow").open_to_write() as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return num_tokens


def as_pairs(offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, samples) of rows of pairs: row r has the chosen samples chosen[offsets[r]:offsets[r+1]].

    The rejected sample of a pair is the one after the chosen one.
    """
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
        self._packed = known["stats"]["packed"]
        self.pairs = known["stats"].get("pairs", False)
        self.rows_of_tokens = 2 if self.pairs else 1  # that each row is read as
        self._store = _Store([entry.parent / name for name in known["samples"][split]])

    def __len__(self) -> int:
        return len(self.num_tokens)

    def samples_of(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the samples in the given rows, one row after the other; NO_ROW holds none."""
        held = [self._samples[self._offsets[row] : self._offsets[row + 1]] for row in rows if row != NO_ROW]
        return np.concatenate(held) if held else np.zeros(0, np.int64)

    def gather(self, rows: np.ndarray) -> pa.Table:
        """The given rows: input_ids, labels and, where rows are packed, position_ids (list<int32> each).

        Positions start at 0 with each sample. A sample's first token is never a label. NO_ROW becomes a row without
        labels, which is read but never trained on. A row of pairs becomes two, chosen and rejected, with `places`
        (list<int64>): for each sample its place among those of the split, NO_ROW where it does not count.
        """
        taken = np.where(rows == NO_ROW, 0, rows)
        per_row = np.repeat(self.num_samples[taken] // self.rows_of_tokens, self.rows_of_tokens)  # of rows of tokens
        samples = self.samples_of(taken)
        pieces = [self._store.sample(int(number)) for number in samples]
        lengths = np.array([len(ids) for ids, _ in pieces], np.int64)
        starts = np.cumsum(lengths) - lengths  # of each sample
        ids = np.concatenate([ids for ids, _ in pieces])
        edges = np.concatenate([spans + start for (_, spans), start in zip(pieces, starts, strict=True)])
        edge = np.zeros(len(ids) + 1, np.int32)
        np.add.at(edge, edges[0::2], 1)
        np.add.at(edge, edges[1::2], -1)
        is_trained = np.cumsum(edge[:-1]) > 0
        firsts = np.concatenate([[0], np.cumsum(per_row)])
        offsets = np.append(starts, len(ids))[firsts].astype(np.int32)
        counts = np.repeat(rows != NO_ROW, self.rows_of_tokens)  # of rows of tokens
        is_trained &= np.repeat(counts, np.diff(offsets))
        labels = np.where(is_trained, ids, IGNORE_INDEX).astype(np.int32)
        positions = (np.arange(len(ids)) - np.repeat(starts, lengths)).astype(np.int32)
        columns = {"input_ids": ids, "labels": labels} | ({"position_ids": positions} if self._packed else {})
        table = pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})
        if not self.pairs:
            return table
        places = np.concatenate([np.arange(self._offsets[row], self._offsets[row + 1]) for row in taken])
        places = np.where(np.repeat(counts, per_row), places, NO_ROW).astype(np.int64)
        return table.append_column("places", pa.ListArray.from_arrays(firsts.astype(np.int32), places))


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
