"""Records to cached rows, on the driver, before any worker or process group exists."""

import collections
from dataclasses import dataclass

from qlora_ray.config import Config, ConfigError, base_model_path, find_file
from qlora_ray.data import cache
from qlora_ray.data.formats import BadRecord, Messages, to_messages
from qlora_ray.data.order import held_out
from qlora_ray.data.read import read_records
from qlora_ray.data.stats import DataStats
from qlora_ray.data.tokenize import Row, load_tokenizer, prompt_ids, tokenize, tokenizer_files
from qlora_ray.storage import Folder


@dataclass(frozen=True)
class Prepared:
    """Where the rows are, and what is known of them."""

    entry: Folder
    stats: DataStats


@dataclass(frozen=True)
class _Tokenized:
    rows: list[Row]
    messages: list[Messages]  # of the rows, in the same order
    rejected: list[tuple[int, str]]  # record number from 1, reason


def prepare(config: Config, storage: Folder) -> Prepared:
    """Tokenize, mask and cache the rows of a run, or find them cached. Raises ConfigError for unusable data."""
    folder = storage / "cache"
    key = _fingerprint(config)
    stats = cache.find(folder, key)
    if stats is None:
        stats = _tokenize_and_write(config, folder, key)
    return Prepared(folder / key, stats)


def check_records(config: Config, storage: Folder) -> None:
    """Refuse files and records that no tokenizer could make good, in the time it takes to parse them.

    Costs a second parse, little beside tokenizing, and only where nothing is cached. Raises ConfigError.
    """
    if cache.find(storage / "cache", _fingerprint(config)) is not None:
        return
    _read(config, config.data.train_file, "data.train_file")
    if config.data.validation_file:
        _read(config, config.data.validation_file, "data.validation_file")


def _tokenize_and_write(config: Config, folder: Folder, key: str) -> DataStats:
    model, data = config.model, config.data
    tokenizer = load_tokenizer(base_model_path(model.base_model), model.revision, model.trust_remote_code)
    train = _tokenize_file(tokenizer, config, data.train_file, "data.train_file")
    num_records = len(train.rows) + len(train.rejected)
    if data.validation_file:
        validation = _tokenize_file(tokenizer, config, data.validation_file, "data.validation_file")
        rows, kept = validation.rows, train.rows
        held = validation.messages
    else:
        out = set(held_out(len(train.rows), data.validation_split, config.training.seed).tolist())
        if len(out) >= len(train.rows):
            raise ConfigError(
                f"data.validation_split={data.validation_split}: holds out all {len(train.rows)} usable records of "
                f"{data.train_file}. Set it to 0 or bring more records."
            )
        rows = [train.rows[i] for i in sorted(out)]
        kept = [row for i, row in enumerate(train.rows) if i not in out]
        held = [train.messages[i] for i in sorted(out)]
    stats = DataStats(
        fingerprint=key,
        num_records=num_records,
        num_rejected=len(train.rejected),
        num_truncated=sum(row.truncated for row in kept),
        num_rows=len(kept),
        num_validation_rows=len(rows),
        num_tokens=sum(len(row.input_ids) for row in kept),
        num_label_tokens=sum(label >= 0 for row in kept for label in row.labels[1:]),
        longest_row=max(len(row.input_ids) for row in kept),
    )
    cache.write(folder, stats, {"train": kept, "validation": rows}, [_prompt(tokenizer, turns) for turns in held])
    return stats


def _read(config: Config, name: str, key: str) -> tuple[dict[int, Messages], list[tuple[int, str]]]:
    """Messages by record number from 1, and the rejected records."""
    usable, rejected = {}, []
    for number, record in enumerate(read_records(find_file(name), key), 1):
        try:
            usable[number] = to_messages(record, config.data.format)
        except BadRecord as reason:
            rejected.append((number, str(reason)))
    _refuse_too_many(config, name, key, len(usable), rejected)
    return usable, rejected


def _tokenize_file(tokenizer, config: Config, name: str, key: str) -> _Tokenized:
    usable, rejected = _read(config, name, key)
    rows, kept = [], []
    for number, messages in usable.items():
        try:
            rows.append(tokenize(tokenizer, messages, config.training.max_length))
            kept.append(messages)
        except BadRecord as reason:
            rejected.append((number, str(reason)))
    _refuse_too_many(config, name, key, len(rows), rejected)
    return _Tokenized(rows, kept, sorted(rejected))


def _refuse_too_many(config: Config, name: str, key: str, num_usable: int, rejected: list[tuple[int, str]]) -> None:
    num_records, limit = num_usable + len(rejected), config.data.max_bad_fraction
    if len(rejected) > limit * num_records or not num_usable:
        raise ConfigError(_too_many_rejected(key, name, num_records, rejected, limit))


def _too_many_rejected(key: str, name: str, num_records: int, rejected: list[tuple[int, str]], limit: float) -> str:
    if not rejected:
        return f"{key}={name}: holds no record."
    common = collections.Counter(reason for _, reason in rejected).most_common(3)
    reasons = "; ".join(
        f"{reason} ({count}x, first: record {next(n for n, r in rejected if r == reason)})" for reason, count in common
    )
    left = " No record is left." if len(rejected) == num_records else ""
    return (
        f"{key}={name}: {len(rejected)} of {num_records} records cannot be used, data.max_bad_fraction allows "
        f"{limit:.0%}: {reasons}.{left}"
    )


def _prompt(tokenizer, messages: Messages) -> dict:
    """The held-out question and its expected answer: the last assistant turn."""
    return {
        "prompt": messages[-2]["content"],
        "expected": messages[-1]["content"],
        "input_ids": prompt_ids(tokenizer, messages[:-1]),
    }


def _fingerprint(config: Config) -> str:
    base, data = base_model_path(config.model.base_model), config.data
    parts: list[bytes | str] = [path.read_bytes() for path in tokenizer_files(base)] or [
        base,
        str(config.model.revision),
    ]
    for key, name in (("train_file", data.train_file), ("validation_file", data.validation_file)):
        if name is None:
            continue
        path = find_file(name)
        if not path.is_file():
            raise ConfigError(f"data.{key}={name}: {'is a folder; name a file' if path.is_dir() else 'no such file'}.")
        parts.append(path.read_bytes())
    parts.append(repr((data.format, data.validation_split, data.max_bad_fraction, config.training.max_length,
                       config.training.seed if data.validation_file is None else None)))  # fmt: skip
    return cache.fingerprint(parts)
