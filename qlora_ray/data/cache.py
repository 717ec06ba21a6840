"""Tokenized rows on disk, once per fingerprint: found whole or not at all, safe under concurrent runs."""

import hashlib
import json
import uuid
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import pyarrow as pa

from qlora_ray.data.stats import DataStats
from qlora_ray.data.tokenize import IGNORE_INDEX, Row
from qlora_ray.storage import Folder

LAYOUT = 1  # raise when the tokens or the file layout change, so that old caches are not read
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})


def fingerprint(parts: list[bytes | str]) -> str:
    """Hex digest (32 digits) over everything that decides the rows."""
    digest = hashlib.sha256(str(LAYOUT).encode())
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def find(cache: Folder, key: str) -> DataStats | None:
    """Statistics of a whole cache entry, or None."""
    stats = cache / key / "stats.json"
    return DataStats(**json.loads(stats.read_bytes())) if stats.exists() else None


def write(cache: Folder, stats: DataStats, splits: dict[str, list[Row]], prompts: list[dict]) -> None:
    """Write rows and statistics under a temporary name and rename; whoever comes second throws his copy away."""
    entry = cache / stats.fingerprint
    temporary = (cache / f".{stats.fingerprint}.{uuid.uuid4().hex[:8]}").make()
    for name, rows in splits.items():
        (temporary / f"{name}.arrow").write_bytes(_to_arrow(rows))
    (temporary / "prompts.json").write_bytes(json.dumps(prompts, ensure_ascii=False).encode())
    (temporary / "stats.json").write_bytes(json.dumps(asdict(stats)).encode())
    if entry.exists() and find(cache, stats.fingerprint) is None:
        entry.delete()  # half of an entry, e.g. copied by hand: it would stand in the way for ever
    try:
        temporary.rename(entry)
    except OSError:
        temporary.delete()
        if find(cache, stats.fingerprint) is None:
            raise


@lru_cache(maxsize=4)
def open_rows(entry: Folder, split: str) -> pa.Table:
    """The rows of a split, memory-mapped where the disk is local: columns input_ids and labels (list<int32>)."""
    source = entry / f"{split}.arrow"
    file = pa.memory_map(source.path) if source.is_local else pa.BufferReader(source.read_bytes())
    return pa.ipc.open_file(file).read_all().combine_chunks()


def label_tokens_per_row(entry: Folder, split: str) -> np.ndarray:
    """Trained-on tokens of each row: (N,) int64. The first token of a row is never predicted."""
    column = open_rows(entry, split)["labels"].combine_chunks()
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
    trained = np.concatenate([[0], np.cumsum(values != IGNORE_INDEX)])
    first_is_trained = (values[offsets[:-1]] != IGNORE_INDEX).astype(np.int64)
    return trained[offsets[1:]] - trained[offsets[:-1]] - first_is_trained


def _to_arrow(rows: list[Row]) -> bytes:
    table = pa.table({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}, SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
