"""The records of a small source as rows in memory: for measuring a model, not for training it."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_ray.config import DataSource
from qlora_ray.data.check import Rejected, messages_of, refuse_missing, refuse_too_many
from qlora_ray.data.pairs import HALVES
from qlora_ray.data.read import BLANK, DamagedFile, cut, read
from qlora_ray.data.sources import Source, find_source
from qlora_ray.data.tokenize import Encoder, Sample, prompt_of
from qlora_ray.errors import BadRecord

Prompts = list[dict[str, Any]]


def read_examples(
    path: str, key: str, encoder: Encoder, format: str = "auto", max_bad_fraction: float = 0.01
) -> tuple[pa.Table, Prompts]:
    """Rows (input_ids and labels, a sample each) and prompts (prompt, expected, input_ids) of whatever `path` names.

    `key` is what messages call it. Raises ConfigError where more than max_bad_fraction of the records cannot be used.
    """
    source = find_source(DataSource(path=path), key)
    samples, prompts = _read(source, encoder, (format, "answers"), max_bad_fraction)
    return to_table(samples), prompts


def read_pairs(
    path: str, key: str, encoder: Encoder, format: str = "auto", max_bad_fraction: float = 0.01
) -> tuple[pa.Table, pa.Table, Prompts] | None:
    """The same of pairs: chosen and rejected samples. None where the first record is no pair."""
    source = find_source(DataSource(path=path), key)
    if not _holds_pairs(source):
        return None
    samples, prompts = _read(source, encoder, (format, "pairs"), max_bad_fraction)
    return to_table(samples[::2]), to_table(samples[1::2]), prompts


def _read(
    source: Source, encoder: Encoder, how: tuple[str, str], max_bad_fraction: float
) -> tuple[list[Sample], Prompts]:  # fmt: skip
    """Samples and prompts of records, `how` being data.format and what they hold."""
    samples: list[Sample] = []
    prompts: Prompts = []
    rejected = Rejected()
    missing: dict[str, tuple[int, str]] = {}
    for where, messages in messages_of(source, *how):
        made = messages if isinstance(messages, BadRecord) else encoder.encode([messages])[0]
        rejected.count(where, made)
        if not isinstance(made, BadRecord) and not isinstance(messages, BadRecord):
            samples += made
            for kind in {kind for sample in made for kind in sample.missing}:
                count, first = missing.get(kind, (0, where))
                missing[kind] = (count + 1, first)
            prompts += filter(None, [prompt_of(encoder.tokenizer, messages)])
    refuse_too_many(source, rejected.num_records, rejected.by_reason, max_bad_fraction)
    refuse_missing(source, rejected.num_records, missing, max_bad_fraction)
    return samples, prompts


def _holds_pairs(source: Source) -> bool:
    """Whether the first record of a source is one of a chosen and a rejected answer. Raises ConfigError."""
    for file in source.files:
        try:
            for _, record in itertools.chain.from_iterable(map(read, cut(file))):
                if record is not BLANK:
                    return isinstance(record, dict) and any(name in record for name in HALVES["chosen"])
        except DamagedFile as error:
            raise source.damaged(file, str(error)) from error
    return False


def to_table(samples: list[Sample]) -> pa.Table:
    """Samples as rows that are not packed: input_ids and labels (list<int32>)."""
    offsets = pa.array(np.cumsum([0, *(len(sample.ids) for sample in samples)]), pa.int32())
    columns = {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
    flat = {name: np.fromiter(itertools.chain.from_iterable(values), np.int32) for name, values in columns.items()}
    return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()})
