"""One chunk of a file becomes one part of the cache: the unit of work, on the driver or as a Ray Data task."""

import collections
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_ray.data.pairs import convert, unused_fields
from qlora_ray.data.read import BLANK, Chunk, DamagedFile, read
from qlora_ray.data.tokenize import Encoder, Sample, open_tokenizer, refuse_lossy, with_template
from qlora_ray.data.turns import Messages
from qlora_ray.errors import BadRecord
from qlora_ray.storage import Folder

# spans: start, end, start, end, ... in tokens, of what is trained on; never token 0, which nothing predicts.
PART_SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "spans": pa.list_(pa.int32())})
RECORDS_AT_ONCE, TEXT_AT_ONCE = 512, 1 << 20  # characters; of one record more
# Of the first chunks' first records the messages are kept, too: held-out questions are taken from them.
CHUNKS_WITH_MESSAGES, RECORDS_WITH_MESSAGES, TEXT_WITH_MESSAGES = 4, 10_000, 64 << 20
TOKENS_PER_BATCH = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a record becomes tokens."""

    base: str
    revision: str | None
    trust_remote_code: bool
    chat_template: str | None  # its text
    format: str
    train_on: str
    max_length: int
    keep_thoughts: str = "template"
    date: str | None = None  # that a template which prints the day prints
    new_tokens: tuple[str, ...] = ()
    records: str = (
        "answers"  # pairs: two conversations, chosen and rejected, which make two samples; labels: see pairs.py
    )


@dataclass(frozen=True)
class Done:
    """What the driver learns of a chunk: counts and lengths, no tokens."""

    num_tokens: np.ndarray  # of each sample, int32
    num_label_tokens: np.ndarray
    num_shared: np.ndarray
    is_desirable: np.ndarray
    record: np.ndarray  # usable record of the chunk that the sample is of, from 0
    num_records: int  # usable or not
    num_places: int  # lines or records that the chunk holds: what places in later chunks are shifted by
    num_truncated: int
    formats: dict[str, int]
    rejected: dict[str, tuple[int, int]]  # by reason: how many, and the place of the first
    missing: dict[
        str, tuple[int, int]
    ]  # by kind, of what records have and their texts have not: the same (see missing.py)
    unused: dict[str, tuple[int, int]]  # by name, of fields that look like content and no format reads
    damage: str | None  # why the rest of the file cannot be read


def tokenize_chunk(chunk: Chunk, recipe: Recipe, entry: Folder, number: int, encoder: Encoder | None = None) -> Done:
    """Write a chunk's files to a cache entry: see samples.py. Without an encoder, with the recipe's."""
    tally = _Tally(
        chunk, recipe, encoder or encoder_of(recipe), RECORDS_WITH_MESSAGES if number < CHUNKS_WITH_MESSAGES else 0
    )
    damage = None
    with (entry / part_name(number)).open_to_write() as file, pa.ipc.new_file(file, PART_SCHEMA) as writer:
        try:
            for record_batch in _record_batches(tally.samples()):
                writer.write_batch(record_batch)
        except DamagedFile as error:
            damage = str(error)
    if tally.rejected:
        lines = [json.dumps(line) for line in sorted(tally.rejected, key=lambda line: line["place"])]
        (entry / rejected_name(number)).write_bytes("\n".join(lines).encode())
    if number < CHUNKS_WITH_MESSAGES:
        (entry / messages_name(number)).write_bytes("\n".join(tally.kept_messages).encode())
    return tally.done(damage)


class _Tally:
    """Encodes a chunk's records, and counts what becomes of them."""

    def __init__(self, chunk: Chunk, recipe: Recipe, encoder: Encoder, num_messages_kept: int):
        self._chunk, self._recipe, self._encoder = chunk, recipe, encoder
        self._num_messages_kept, self._text_left = num_messages_kept, TEXT_WITH_MESSAGES
        self._of_samples = array("i")  # num_tokens, num_label_tokens, num_shared, is_desirable, record; and so on
        self._num_records = self._num_places = self._num_usable = self._num_truncated = 0
        self._formats: collections.Counter[str] = collections.Counter()
        self._missing: dict[str, tuple[int, int]] = {}
        self._unused: dict[str, tuple[int, int]] = {}
        self.rejected: list[dict[str, Any]] = []
        self.kept_messages: list[str] = []

    def samples(self) -> Iterator[Sample]:
        """Every sample of the chunk, in the order of its records. Raises DamagedFile."""
        for batch in _batches(self._records()):
            encoded = self._encoder.encode([messages for _, messages in batch])
            for (place, messages), made in zip(batch, encoded, strict=True):
                if isinstance(made, BadRecord):
                    self._reject(place, made)
                    continue
                for sample in made:
                    counts = (len(sample.ids), sample.num_labels, sample.num_shared, sample.is_desirable)
                    self._of_samples.extend((*counts, self._num_usable))
                self._num_truncated += any(sample.truncated for sample in made)
                _count(self._missing, {kind for sample in made for kind in sample.missing}, place)
                if self._num_usable < self._num_messages_kept and self._text_left > 0:
                    self.kept_messages.append(json.dumps(messages))
                    self._text_left -= len(self.kept_messages[-1])
                self._num_usable += 1
                yield from made

    def done(self, damage: str | None) -> Done:
        columns = np.array(self._of_samples, np.int32).reshape(-1, 5)
        reasons: dict[str, tuple[int, int]] = {}
        for line in self.rejected:
            count, first = reasons.get(line["reason"], (0, line["place"]))
            reasons[line["reason"]] = (count + 1, min(first, line["place"]))
        return Done(
            num_tokens=columns[:, 0].copy(),
            num_label_tokens=columns[:, 1].copy(),
            num_shared=columns[:, 2].copy(),
            is_desirable=columns[:, 3].astype(bool),
            record=columns[:, 4].copy(),
            num_records=self._num_records,
            num_places=self._num_places,
            num_truncated=self._num_truncated,
            formats=dict(self._formats),
            rejected=reasons,
            missing=self._missing,
            unused=self._unused,
            damage=damage,
        )

    def _records(self) -> Iterator[tuple[int, Messages]]:
        for place, record in read(self._chunk):
            self._num_places = place
            if record is BLANK:
                continue
            self._num_records += 1
            try:
                if isinstance(record, BadRecord):
                    raise record
                messages, name = convert(record, self._recipe.format, self._recipe.records)
            except BadRecord as reason:
                self._reject(place, reason)
                continue
            self._formats[name] += 1
            _count(self._unused, unused_fields(record, name, self._recipe.records), place)
            yield place, messages

    def _reject(self, place: int, reason: BadRecord) -> None:
        self.rejected.append({"place": place, "reason": str(reason), "detail": reason.detail})


def _batches(records: Iterator[tuple[int, Messages]]) -> Iterator[list[tuple[int, Messages]]]:
    """Records that are encoded together: as many as their texts allow."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += sum(len(str(value)) for turn in record[1] for value in turn.values())
        if len(batch) == RECORDS_AT_ONCE or size >= TEXT_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _count(counts: dict[str, tuple[int, int]], kinds: Iterable[str], place: int) -> None:
    for kind in kinds:
        number, first = counts.get(kind, (0, place))
        counts[kind] = (number + 1, first)


def part_name(number: int) -> str:
    """File of the samples that chunk `number` has made."""
    return f"part_{number:06d}.arrow"


def rejected_name(number: int) -> str:
    """File of the records that chunk `number` has left out."""
    return f"rejected_{number:06d}.jsonl"


def messages_name(number: int) -> str:
    """File of the messages that chunk `number` has found."""
    return f"messages_{number:06d}.jsonl"


def _record_batches(samples: Iterator[Sample]) -> Iterator[pa.RecordBatch]:
    held: list[Sample] = []
    tokens = 0
    for sample in samples:
        held.append(sample)
        tokens += len(sample.ids)
        if tokens >= TOKENS_PER_BATCH:
            yield to_record_batch(held)
            held, tokens = [], 0
    if held:
        yield to_record_batch(held)


def to_record_batch(samples: list[Sample]) -> pa.RecordBatch:
    """Samples as rows of PART_SCHEMA."""
    ids = [sample.ids for sample in samples]
    spans = [[edge for span in sample.spans for edge in span] for sample in samples]
    return pa.record_batch([_lists(ids), _lists(spans)], schema=PART_SCHEMA)


def _lists(values: Iterable[Sequence[int]]) -> pa.Array:
    arrays = [value if isinstance(value, array) else array("i", value) for value in values]
    sizes = np.fromiter(map(len, arrays), np.int32, len(arrays))
    flat = np.frombuffer(b"".join(arrays), np.int32)
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), flat)


@lru_cache(maxsize=2)
def encoder_of(recipe: Recipe) -> Encoder:
    """The encoder that a recipe describes; loaded once in a process. Raises ConfigError."""
    tokenizer: Any = open_tokenizer(recipe.base, recipe.revision, recipe.trust_remote_code, recipe.new_tokens)
    refuse_lossy(tokenizer, recipe.base)
    with_template(tokenizer, recipe.chat_template, recipe.date)
    return encoder_with(tokenizer, recipe)


def encoder_with(tokenizer: Any, recipe: Recipe) -> Encoder:
    """The same with its tokenizer, template and all, from another process."""
    return Encoder(tokenizer, recipe.max_length, recipe.train_on, recipe.keep_thoughts)
