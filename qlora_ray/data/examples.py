"""The records of a small source as rows in memory: for measuring a model, not for training it."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_ray.config import DataSource
from qlora_ray.data.check import Rejected, messages_of, refuse_missing, refuse_too_many
from qlora_ray.data.sources import find_source
from qlora_ray.data.tokenize import Encoder, Sample, prompt_of
from qlora_ray.errors import BadRecord


def read_examples(
    path: str, key: str, encoder: Encoder, format: str = "auto", max_bad_fraction: float = 0.01
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Rows (input_ids and labels, a sample each) and prompts (prompt, expected, input_ids) of whatever `path` names.

    `key` is what messages call it. Raises ConfigError where more than max_bad_fraction of the records cannot be used.
    """
    source = find_source(DataSource(path=path), key)
    samples: list[Sample] = []
    prompts: list[dict[str, Any]] = []
    rejected = Rejected()
    missing: dict[str, tuple[int, str]] = {}
    for where, messages in messages_of(source, format):
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
    return to_table(samples), prompts


def to_table(samples: list[Sample]) -> pa.Table:
    """Samples as rows that are not packed: input_ids and labels (list<int32>)."""
    offsets = pa.array(np.cumsum([0, *(len(sample.ids) for sample in samples)]), pa.int32())
    columns = {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
    flat = {name: np.fromiter(itertools.chain.from_iterable(values), np.int32) for name, values in columns.items()}
    return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in flat.items()})
