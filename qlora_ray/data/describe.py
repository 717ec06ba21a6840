"""What is known of prepared data, as JSON holds it: counts, a histogram of lengths, rows with their mask."""

import dataclasses
from typing import Any

import numpy as np

from qlora_ray.data.prepare import Prepared
from qlora_ray.data.rows import Rows
from qlora_ray.data.tokenize import IGNORE_INDEX

NUM_BINS = 12


def describe(made: Prepared) -> dict[str, Any]:
    """Counts of an epoch's training rows (see DataStats), shares, lengths, and what was rejected why."""
    stats, sources = made.stats, (*made.train, *made.validation)
    lengths = np.concatenate([samples.index()["num_tokens"] for samples in made.train])
    return {
        **dataclasses.asdict(stats),
        "notes": list(stats.notes),
        "label_share": stats.num_label_tokens / stats.num_tokens,
        "packing_efficiency": stats.packing_efficiency,
        "length_histogram": histogram(lengths, stats.max_length),
        "median_length": float(np.median(lengths)),
        "longest_sample": int(lengths.max()),
        "num_validation_label_tokens": int(Rows(made.entry, "validation").num_label_tokens.sum()),
        "rejected": reasons(made),
        "rejected_files": [f"{samples.entry.path}/rejected.jsonl" for samples in sources if samples.rejected],
        "cache_entry": made.entry.path,
    }


def reasons(made: Prepared) -> dict[str, int]:
    """How many training and validation records were rejected, by reason, the most frequent first."""
    total: dict[str, int] = {}
    for samples in (*made.train, *made.validation):
        for reason, (count, _) in samples.rejected.items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def histogram(lengths: np.ndarray, max_length: int) -> list[dict[str, int]]:
    """Samples by length in equal bins from 1 to the longest: first and last length of a bin, and how many."""
    width = max(1, -(-int(min(lengths.max(), max_length)) // NUM_BINS))
    counts = np.bincount((lengths - 1) // width)
    return [{"from": i * width + 1, "to": (i + 1) * width, "samples": int(n)} for i, n in enumerate(counts)]


def show_rows(made: Prepared, tokenizer, count: int) -> list[dict[str, Any]]:
    """The first rows of training: their tokens' text in pieces, each of one sample and either trained on or not."""
    rows = Rows(made.entry, "train")
    shown = []
    for row in rows.gather(np.arange(min(count, len(rows)))).to_pylist():
        ids = np.array(row["input_ids"])
        trained = np.array(row["labels"]) != IGNORE_INDEX
        positions = np.array(row.get("position_ids") or range(len(ids)))
        sample = np.cumsum(positions == 0)
        is_border = np.flatnonzero((np.diff(trained) != 0) | (np.diff(sample) != 0)) + 1
        pieces = [
            {"sample": int(sample[a]), "trained": bool(trained[a]), "text": tokenizer.decode(ids[a:b].tolist())}
            for a, b in zip([0, *is_border], [*is_border, len(ids)], strict=True)
        ]
        shown.append({"num_tokens": len(ids), "num_label_tokens": int(trained.sum()), "pieces": pieces})
    return shown
