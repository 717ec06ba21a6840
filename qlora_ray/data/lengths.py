"""How long a data set's samples are, from a part of its records, tokenized as a run would and not cut."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from qlora_ray.config import Config
from qlora_ray.data.formats import convert
from qlora_ray.data.missing import TOLD
from qlora_ray.data.prepare import make_recipe
from qlora_ray.data.read import BLANK, Chunk, count, cut, read
from qlora_ray.data.sources import Source, find_sources
from qlora_ray.data.template import NAMED, PLAIN_TEMPLATE
from qlora_ray.data.tokenize import Encoder, Sample
from qlora_ray.data.turns import Messages
from qlora_ray.data.work import encoder_of
from qlora_ray.errors import BadRecord, ConfigError, DamagedFile

MOST_RECORDS = 2000  # that are tokenized
MOST_CHUNKS = 16  # that they are taken from
RECORDS_AT_ONCE = 256
NEVER_CUT = 1 << 30  # tokens


@dataclass(frozen=True)
class Lengths:
    """What is known of the samples that were looked at, and how many records there are in all."""

    num_records: int
    bad_share: float  # of the records that were looked at, those that a run would refuse
    formats: tuple[str, ...]  # the most frequent first
    num_tokens: np.ndarray  # (N,) of each sample
    num_label_tokens: np.ndarray  # (N,)
    first_label: np.ndarray  # (N,) tokens before what is trained on: a shorter row has nothing to learn from
    last_answer: np.ndarray  # (N,) tokens before the last answer: what a held-out prompt takes

    @property
    def is_raw_text(self) -> bool:
        """Whether records are plain texts, which have no question to answer."""
        return self.formats == ("text",)

    def percentile(self, share: float) -> int:
        """Tokens within which so many of 100 samples are."""
        return int(np.ceil(np.percentile(self.num_tokens, share)))


def measure(config: Config) -> tuple[str | None, Lengths]:
    """The chat template to ask for, None for the tokenizer's own, and the lengths under it.

    It is the tokenizer's own, or plain where it has none, if that shows the records; else chatml, if that is better.
    Raises ConfigError for a damaged file, and where no record can be used.
    """
    sources = find_sources(config, "train_file")
    recipe = replace(make_recipe(config), max_length=NEVER_CUT)
    own = encoder_of(recipe)
    name = "plain" if own.tokenizer.chat_template.endswith(PLAIN_TEMPLATE) else None
    lengths = look(sources, own, config.data.format)
    if lengths is None or lengths.bad_share > config.data.max_bad_fraction:
        other = look(sources, encoder_of(replace(recipe, chat_template=NAMED["chatml"])), config.data.format)
        if lengths is None or (other and other.bad_share < lengths.bad_share):
            name, lengths = "chatml", other
    if lengths is None:
        where = f"{sources[0].key}={sources[0].entry.path}"
        raise ConfigError(f"{where}: no record can be used; python -m qlora_ray.data --check says of each why.")
    return name, lengths


def look(sources: tuple[Source, ...], encoder: Encoder, format: str) -> Lengths | None:
    """Tokenize records from all over the sources, with an encoder that cuts nothing; None where none can be used."""
    records, formats, samples = list(_records(sources)), Counter[str](), list[list[Sample]]()
    for start in range(0, len(records), RECORDS_AT_ONCE):
        converted = [one for one in map(partial(_converted, format=format), records[start:][:RECORDS_AT_ONCE]) if one]
        formats.update(name for _, name in converted)
        encoded = encoder.encode([messages for messages, _ in converted])
        samples += [made for made in encoded if not isinstance(made, BadRecord)]
    if not samples:
        return None
    columns = [(len(s.ids), s.num_labels, s.spans[0][0], s.spans[-1][0]) for made in samples for s in made]
    names = tuple(name for name, _ in formats.most_common())
    num_left_out = sum(any(kind not in TOLD for sample in made for kind in sample.missing) for made in samples)
    bad = max(len(records) - len(samples), num_left_out) / len(records)
    return Lengths(sum(map(_count, sources)), bad, names, *np.array(columns, np.int64).T)


def _records(sources: tuple[Source, ...]) -> Iterator[object]:
    chunks = [(source, chunk) for source in sources for chunk in _chunks(source)]
    if len(chunks) > MOST_CHUNKS:
        chunks = [chunks[i * len(chunks) // MOST_CHUNKS] for i in range(MOST_CHUNKS)]
    for source, chunk in chunks:
        yield from itertools.islice(_of_chunk(source, chunk), MOST_RECORDS // len(chunks))


def _chunks(source: Source) -> list[Chunk]:
    found: list[Chunk] = []
    for file in source.files:
        try:
            found += cut(file)
        except DamagedFile as error:
            raise source.damaged(file, str(error)) from error
    return found


def _of_chunk(source: Source, chunk: Chunk) -> Iterator[object]:
    try:
        yield from (record for _, record in read(chunk) if record is not BLANK)
    except DamagedFile as error:
        raise source.damaged(chunk.file, str(error)) from error


def _converted(record: object, format: str) -> tuple[Messages, str] | None:
    try:
        return None if isinstance(record, BadRecord) else convert(record, format)
    except BadRecord:
        return None


def _count(source: Source) -> int:
    total = 0
    for file in source.files:
        try:
            total += count(file)
        except DamagedFile as error:
            raise source.damaged(file, str(error)) from error
    return total
