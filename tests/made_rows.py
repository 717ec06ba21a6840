"""A cache entry of rows from samples given as token ids and spans, written as the product writes it."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from qlora_ray.data.deal import Index
from qlora_ray.data.rows import Rows, write_rows, write_stats
from qlora_ray.data.stats import DataStats
from qlora_ray.data.tokenize import Sample
from qlora_ray.data.work import PART_SCHEMA, to_record_batch
from qlora_ray.storage import Folder, open_folder


def make_entry(
    folder: Path, samples: list[Sample], rows: list[list[int]], packed: bool = True, pairs: str = ""
) -> Folder:
    """An entry whose train and validation splits have these rows of sample numbers, in parts of three samples.

    `pairs`: apart or shared, as rows of pairs hold their prompts.
    """
    cache = open_folder(str(folder))
    parts = []
    for number, first in enumerate(range(0, len(samples), 3)):
        some = samples[first : first + 3]
        name = f"part_{number}.arrow"
        with (cache / "samples" / name).open_to_write() as file, pa.ipc.new_file(file, PART_SCHEMA) as writer:
            writer.write_batch(to_record_batch(some[:2]))
            if some[2:]:
                writer.write_batch(to_record_batch(some[2:]))
        parts.append((name, 0, len(some)))
    (cache / "samples" / "manifest.json").write_bytes(json.dumps({"parts": parts}).encode())
    numbers = np.arange(len(samples))
    tokens = np.array([len(sample.input_ids) for sample in samples])
    labels = np.array([sample.num_labels for sample in samples])
    shared, desirable = (np.array([getattr(one, name) for one in samples]) for name in ("num_shared", "is_desirable"))
    offsets = np.cumsum([0, *map(len, rows)])
    for split in ("train", "validation"):
        index = Index(tokens, labels, shared, desirable, numbers, numbers)
        held = np.concatenate(rows)
        lengths = tokens[held] - shared[held] * (pairs == "shared")
        of_rows = write_rows(cache / "rows", split, (offsets, held), index, lengths)
    stats = DataStats(
        "rows", len(samples), 0, 0, len(rows), len(rows), int(of_rows.sum()), int(labels.sum()), int(of_rows.max()),
        packed=packed, pairs=bool(pairs), shares_prompts=pairs == "shared",
    )  # fmt: skip
    write_stats(cache / "rows", stats, {"train": ["samples"], "validation": ["samples"]}, None)
    return cache / "rows"


def make_random_entry(folder: Path, rows: list[list[int]], packed: bool = True) -> Folder:
    """An entry of rows whose samples have these lengths, random tokens, and answers in their last two thirds."""
    random = np.random.default_rng(1)
    lengths = [length for row in rows for length in row]
    samples = [
        Sample(random.integers(3, 2048, length).tolist(), [(max(1, length // 3), length)], False) for length in lengths
    ]
    firsts = np.cumsum([0, *map(len, rows)]).tolist()
    numbers = [list(range(first, first + len(row))) for first, row in zip(firsts, rows, strict=False)]
    return make_entry(folder, samples, numbers, packed)


def make_rows(folder: Path, samples: list[Sample], rows: list[list[int]], packed: bool = True, pairs: str = "") -> Rows:
    return Rows(make_entry(folder, samples, rows, packed, pairs), "train")
