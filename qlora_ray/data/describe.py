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
    """The first rows of training: their tokens' text in pieces, each of one sample and either trained on or not.

    Of rows of pairs: each pair's prompt, and the pieces of its two answers, which say what differs.
    """
    rows = Rows(made.entry, "train")
    if rows.labelled:
        return [_show_labelled(rows, row, tokenizer) for row in range(min(count, len(rows)))]
    if rows.pairs:
        return [_show_pairs(rows, row, tokenizer) for row in range(min(count, len(rows)))]
    table, shown = rows.gather(np.arange(min(count, len(rows)))).to_pylist(), []
    for row in table:
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


def _show_pairs(rows: Rows, row: int, tokenizer) -> dict[str, Any]:
    """The pairs of a row."""
    chosen, rejected = (half.to_pylist() for half in rows.halves(np.array([row])))
    pairs = []
    for one, other in zip(chosen, rejected, strict=True):
        (ids, start), (other_ids, other_start) = map(_with_start, (one, other))
        answers = _show_answers(ids[start:], other_ids[other_start:], tokenizer)
        pairs.append({"prompt": tokenizer.decode(ids[:start]), **answers})
    counts = {name: int(getattr(rows, name)[row]) for name in ("num_tokens", "num_label_tokens")}
    return {**counts, "pairs": pairs}


def _show_labelled(rows: Rows, row: int, tokenizer) -> dict[str, Any]:
    """The labelled answers of a row: prompts and answers in pieces, each of one sample that is desirable or not."""
    pieces = []
    answers, are_desirable = rows.halves(np.array([row]))[0], rows.gather(np.array([row]))["is_desirable"][0]
    for number, (sample, label) in enumerate(zip(answers.to_pylist(), are_desirable.as_py(), strict=True), start=1):
        ids, start = _with_start(sample)
        for trained, part in ((False, ids[:start]), (True, ids[start:])):
            piece = {"sample": number, "trained": trained, "desirable": label, "text": tokenizer.decode(part)}
            pieces.append(piece)
    counts = {name: int(getattr(rows, name)[row]) for name in ("num_tokens", "num_label_tokens")}
    return {**counts, "pieces": pieces}


def _with_start(sample: dict[str, list[int]]) -> tuple[list[int], int]:
    """Token ids of a sample, and where its answer begins."""
    return sample["input_ids"], next(i for i, label in enumerate(sample["labels"]) if label != IGNORE_INDEX)


def _show_answers(chosen: list[int], rejected: list[int], tokenizer) -> dict[str, Any]:
    """Pieces of two answers: the beginning and the end that they share, and between these what differs."""
    shorter = min(len(chosen), len(rejected))
    begin = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    end = next((i for i in range(shorter - begin) if chosen[-1 - i] != rejected[-1 - i]), shorter - begin)
    shown = {}
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        edges = [0, begin, len(ids) - end, len(ids)]
        shown[name] = [
            {"differs": number == 1, "text": tokenizer.decode(ids[a:b])}
            for number, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))
            if a < b
        ]
    return shown
