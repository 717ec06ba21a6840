"""Looks at records before anything is tokenized: what is unusable is told in the time that parsing takes."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_ray.config import Config
from qlora_ray.data.formats import FORMATS, load_function
from qlora_ray.data.missing import CALL, NAME, THOUGHT, TOLD, TOOLS
from qlora_ray.data.pairs import convert, label_of
from qlora_ray.data.read import BLANK, DamagedFile, cut, place_unit, read
from qlora_ray.data.samples import INLINE_BYTES
from qlora_ray.data.sources import Source, find_sources
from qlora_ray.data.template import find_template
from qlora_ray.data.turns import Messages
from qlora_ray.errors import BadRecord, ConfigError

PEEKED_RECORDS = 1000
WAY_OUT = "Use a data.chat_template that shows it."
WAYS_OUT = {
    THOUGHT: "Use a data.chat_template that shows thoughts (chatml does), or take them out of the records.",
    CALL: "Use a data.chat_template that knows tools (chatml does), or take them out of the records.",
    TOOLS: "Use a data.chat_template that knows tools (chatml does), or take them out of the records.",
    NAME: "Use a data.chat_template that shows names, or take them out of the records.",
}


def check_records(config: Config) -> None:
    """Refuse what a look at names and first records can tell, before Ray starts. Raises ConfigError.

    Small sources are parsed whole: little beside tokenizing. Of others, the first records must not all be bad.
    """
    if config.data.format not in FORMATS and config.data.format != "auto":
        load_function(config.data.format)
    find_template(config.data.chat_template)
    for key in ("train_file", "validation_file"):
        sources = find_sources(config, key, download=False)
        are_whole, labels = all(map(_is_small, sources)), []
        for source in sources:
            rejected = Rejected()
            found = messages_of(source, config.data.format, config.training.records)
            for where, made in itertools.islice(found, None if _is_small(source) else PEEKED_RECORDS):
                rejected.count(where, made)
                if not isinstance(made, BadRecord):
                    labels.append(label_of(made))
            limit = config.data.max_bad_fraction if _is_small(source) else 1.0
            refuse_too_many(source, rejected.num_records, rejected.by_reason, limit)
        if config.training.records == "labels" and key == "train_file" and are_whole:
            refuse_one_kind(labels, f"data.{key}={', '.join(source.entry.path for source in sources)}")


def refuse_one_kind(are_desirable: Sequence[Any], what: str) -> None:
    """Raise ConfigError where labelled answers are all of one kind."""
    kinds = set(are_desirable)
    if len(kinds) == 1:
        kind = "desirable (label: true)" if True in kinds else "undesirable (label: false)"
        raise ConfigError(
            f"{what}: all {len(are_desirable):,} answers are {kind}, and training.objective=kto tells one kind from "
            "the other. Add answers of the other kind, or learn good ones with training.objective=sft."
        )


def _is_small(source: Source) -> bool:
    return source.num_bytes <= INLINE_BYTES


def messages_of(source: Source, format: str, records: str = "answers") -> Iterator[tuple[str, Messages | BadRecord]]:
    """(place, messages or why there are none) of each record of a source. Raises ConfigError for a damaged file."""
    for file in source.files:
        unit, of_file = place_unit(file), f" of {file.name}" if len(source.files) > 1 else ""
        try:
            for place, record in itertools.chain.from_iterable(map(read, cut(file))):
                if record is not BLANK:
                    yield f"{unit} {place}{of_file}", _messages(record, format, records)
        except DamagedFile as error:
            raise source.damaged(file, str(error)) from error


class Rejected:
    """Counts records, and the bad ones by reason."""

    def __init__(self) -> None:
        self.num_records = 0
        self.by_reason: dict[str, tuple[int, str]] = {}  # how many, and where the first is

    def count(self, where: str, made: object) -> None:
        """Note one record, and why it is rejected if `made` is a BadRecord; `where` names its place."""
        self.num_records += 1
        if isinstance(made, BadRecord):
            detail = f", {made.detail}" if made.detail else ""
            number, first = self.by_reason.get(str(made), (0, where + detail))
            self.by_reason[str(made)] = (number + 1, first)


def refuse_too_many(source: Source, num_records: int, rejected: dict[str, tuple[int, str]], limit: float) -> None:
    """Raise ConfigError where more than `limit` of the records, or all, cannot be used."""
    num_rejected = sum(count for count, _ in rejected.values())
    where = f"{source.key}={source.entry.path}"
    if not num_records:
        raise ConfigError(f"{where}: holds no record.")
    if num_rejected <= limit * num_records and num_rejected < num_records:
        return
    common = sorted(rejected.items(), key=lambda item: -item[1][0])[:3]
    reasons = "; ".join(f"{reason} ({count}x, first: {first})" for reason, (count, first) in common)
    left = " No record is left." if num_rejected == num_records else ""
    raise ConfigError(
        f"{where}: {num_rejected} of {num_records} records cannot be used, data.max_bad_fraction allows {limit:.0%}: "
        f"{reasons}.{left}"
    )


def refuse_missing(source: Source, num_records: int, missing: dict[str, tuple[int, str]], limit: float) -> None:
    """Raise ConfigError where the template leaves out of more than `limit` of the records what it should not."""
    for kind, (count, first) in missing.items():
        if kind not in TOLD and count > limit * num_records:
            raise ConfigError(
                f"{source.key}={source.entry.path}: the chat template leaves out {kind}, in {count} of {num_records} "
                f"records (first: {first}); data.max_bad_fraction allows {limit:.0%}. {WAYS_OUT.get(kind, WAY_OUT)}"
            )


def _messages(record: object, format: str, records: str) -> Messages | BadRecord:
    if isinstance(record, BadRecord):
        return record
    try:
        return convert(record, format, records)[0]
    except BadRecord as reason:
        return reason
