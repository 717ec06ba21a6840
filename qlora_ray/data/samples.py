"""The samples of one source on disk: tokenized once per fingerprint, found whole or not at all.

cache/samples-<fingerprint>/
    part_000000.arrow    a chunk's samples: input_ids, spans (see work.py)
    index.arrow          of each sample: num_tokens, num_label_tokens, num_shared, is_desirable, record (number, from 0)
    messages_000000.jsonl    of the first chunks: the messages of each record that its samples are of, in order
    rejected.jsonl       a line per rejected record: file, line or record, reason, detail; absent where there is none
    token_counts.npy     how often each token comes, where that was asked for (see vocabulary.py)
    manifest.json        counts, and the parts with their sizes; written last: without it there is no entry

Each file appears whole, and the same inputs make the same bytes: two writers at once do no harm.
"""

import collections
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_ray.data.formats import FORMATS, load_function
from qlora_ray.data.read import Chunk, DamagedFile, cut, place_unit
from qlora_ray.data.sources import Source, content_hash
from qlora_ray.data.tokenize import tokenizer_files
from qlora_ray.data.turns import Messages
from qlora_ray.data.work import (
    CHUNKS_WITH_MESSAGES,
    Done,
    Recipe,
    messages_name,
    part_name,
    rejected_name,
    tokenize_chunk,
)
from qlora_ray.storage import Folder

LAYOUT = 5  # raise when the tokens or the files change, so that old caches are not read
INLINE_BYTES = 8 << 20  # less than this is tokenized in seconds: sooner done than handed to Ray
MANIFEST = "manifest.json"

# Tokenizes chunks somewhere, in any order: (chunk number, Done) pairs.
Runner = Callable[[list[Chunk], Recipe, Folder], Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Samples:
    """A whole cache entry of a source."""

    entry: Folder
    num_records: int  # usable or not
    num_usable: int
    num_truncated: int
    formats: dict[str, int]
    rejected: dict[str, tuple[int, str]]  # by reason: how many, and where the first is, for people
    missing: dict[str, tuple[int, str]]  # by kind, of what records have and their texts have not: the same
    unused: dict[str, tuple[int, str]]  # by name, of fields that look like content and no format reads
    parts: tuple[tuple[str, int, int], ...]  # name, bytes, samples

    @property
    def num_rejected(self) -> int:
        """Records that are left out."""
        return self.num_records - self.num_usable

    def messages(self) -> Iterator[tuple[int, Messages]]:
        """(record, messages) of the first usable records: as many as were kept (see work.py)."""
        first, record = 0, self.index()["record"]
        for number, (_, _, count) in enumerate(self.parts[:CHUNKS_WITH_MESSAGES]):
            if count:
                lines = (self.entry / messages_name(number)).read_bytes().splitlines()
                yield from ((int(record[first]) + i, json.loads(line)) for i, line in enumerate(lines))
                first += count

    def rejected_lines(self) -> bytes:
        """The content of rejected.jsonl."""
        return (self.entry / "rejected.jsonl").read_bytes() if self.rejected else b""

    def index(self) -> dict[str, np.ndarray]:
        """num_tokens, num_label_tokens, num_shared, is_desirable and record of each sample, (N,) each."""
        with pa.ipc.open_file(pa.BufferReader((self.entry / "index.arrow").read_bytes())) as file:
            table = file.read_all()
        return {name: table[name].to_numpy() for name in table.column_names}


def fingerprint(parts: list[bytes | str]) -> str:
    """Hex digest (32 digits) over everything that decides what is cached."""
    digest = hashlib.sha256(str(LAYOUT).encode())
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def recipe_hash(recipe: Recipe) -> bytes:
    """Digest over what a recipe names: the tokenizer's files, the template's text, the format function's module."""
    files: list[bytes | str] = [path.read_bytes() for path in tokenizer_files(recipe.base, recipe.revision)]
    files = files or [recipe.base, str(recipe.revision)]
    settings = [recipe.format, recipe.train_on, str(recipe.max_length), recipe.chat_template or "",
                recipe.keep_thoughts, recipe.date or "", *recipe.new_tokens, recipe.records]  # fmt: skip
    if recipe.format not in FORMATS and recipe.format != "auto":
        source = load_function(recipe.format)[1].__file__
        if source:
            with open(source, "rb") as file:
                files.append(file.read())
    return fingerprint([*files, *settings]).encode()


def samples_of(source: Source, recipe: Recipe, cache: Folder, run: Runner, tell: Tell) -> Samples:
    """The tokenized samples of a source: found, or made with `run`. Raises ConfigError for a damaged file."""
    entry = cache / f"samples-{fingerprint([content_hash(source), recipe_hash(recipe)])}"
    return find(entry) or _make(source, recipe, entry, run, tell)


def find(entry: Folder) -> Samples | None:
    """The entry, if it is whole."""
    sizes = entry.sizes()
    if MANIFEST not in sizes:
        return None
    known = json.loads((entry / MANIFEST).read_bytes())
    found = Samples(entry, **{**known, "parts": tuple(map(tuple, known["parts"]))})
    whole = all(sizes.get(name) == num_bytes for name, num_bytes, _ in found.parts)
    return found if whole else None  # copied in part, say: it is made anew


def run_inline(chunks: list[Chunk], recipe: Recipe, entry: Folder):
    """Tokenize chunk after chunk in this process."""
    for number, chunk in enumerate(chunks):
        yield number, tokenize_chunk(chunk, recipe, entry, number)


def _make(source: Source, recipe: Recipe, entry: Folder, run: Runner, tell: Tell) -> Samples:
    chunks: list[Chunk] = []
    for file in source.files:
        try:
            chunks += cut(file)
        except DamagedFile as error:
            raise source.damaged(file, str(error)) from error
    done: dict[int, Done] = {}
    for number, result in run(chunks, recipe, entry):
        if result.damage:
            raise source.damaged(chunks[number].file, result.damage)
        done[number] = result
        if len(done) * 10 // len(chunks) > (len(done) - 1) * 10 // len(chunks) and len(chunks) > 10:
            tell(f"tokenizing {source.entry.path}: {len(done):,} of {len(chunks):,} chunks")
    results = [done[number] for number in range(len(chunks))]
    shifts = _places_before(chunks, results)
    _write_index(entry, results)
    _join_rejected(entry, chunks, results, shifts)
    sizes = entry.sizes()
    made = Samples(
        entry=entry,
        num_records=sum(result.num_records for result in results),
        num_usable=sum(_num_usable(result) for result in results),
        num_truncated=sum(result.num_truncated for result in results),
        formats=dict(sum((collections.Counter(result.formats) for result in results), collections.Counter())),
        rejected=_counts(chunks, [result.rejected for result in results], shifts),
        missing=_counts(chunks, [result.missing for result in results], shifts),
        unused=_counts(chunks, [result.unused for result in results], shifts),
        parts=tuple((part_name(i), sizes[part_name(i)], len(result.num_tokens)) for i, result in enumerate(results)),
    )
    known = {name: value for name, value in vars(made).items() if name != "entry"}
    (entry / MANIFEST).write_bytes(json.dumps(known, ensure_ascii=False, indent=1).encode())
    return find(entry) or made


def _num_usable(result: Done) -> int:
    return int(result.record[-1]) + 1 if len(result.record) else 0


def _places_before(chunks: list[Chunk], results: list[Done]) -> list[int]:
    """Lines or records of the file that come before each chunk."""
    shifts, lines = [], 0
    for chunk, result in zip(chunks, results, strict=True):
        lines = lines if chunk.start and chunk.num_before is None else 0
        shifts.append(lines if chunk.num_before is None else chunk.num_before)
        lines += result.num_places
    return shifts


def _write_index(entry: Folder, results: list[Done]) -> None:
    before = np.cumsum([0, *map(_num_usable, results)])
    none = np.zeros(0, np.int32)
    table = pa.table(
        {
            "num_tokens": np.concatenate([none, *(result.num_tokens for result in results)]),
            "num_label_tokens": np.concatenate([none, *(result.num_label_tokens for result in results)]),
            "num_shared": np.concatenate([none, *(result.num_shared for result in results)]),
            "is_desirable": np.concatenate([none.astype(bool), *(result.is_desirable for result in results)]),
            "record": np.concatenate(
                [
                    none.astype(np.int64),
                    *(result.record + first for result, first in zip(results, before[:-1], strict=True)),
                ]
            ),
        }
    )
    with (entry / "index.arrow").open_to_write() as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _join_rejected(entry: Folder, chunks: list[Chunk], results: list[Done], shifts: list[int]) -> None:
    """rejected.jsonl from the chunks' own, with places counted from the file's start."""
    numbers = [number for number, result in enumerate(results) if result.rejected]
    if not numbers:
        return
    units = {file: place_unit(file) for file in {chunks[number].file for number in numbers}}
    with (entry / "rejected.jsonl").open_to_write() as joined:
        for number in numbers:
            file = chunks[number].file
            for line in (entry / rejected_name(number)).read_bytes().splitlines():
                known = json.loads(line)
                place = known.pop("place") + shifts[number]
                whole = {"file": file.name, units[file]: place, **{k: v for k, v in known.items() if v}}
                joined.write(json.dumps(whole, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def _counts(
    chunks: list[Chunk], counted: list[dict[str, tuple[int, int]]], shifts: list[int]
) -> dict[str, tuple[int, str]]:
    """By reason, kind or name, the most frequent first: how many, and where the first is."""
    found: dict[str, tuple[int, str]] = {}
    several = len({chunk.file for chunk in chunks}) > 1
    for chunk, of_chunk, shift in zip(chunks, counted, shifts, strict=True):
        for reason, (count, place) in of_chunk.items():
            where = f"{place_unit(chunk.file)} {place + shift}" + (f" of {chunk.file.name}" if several else "")
            before, first = found.get(reason, (0, where))
            found[reason] = (before + count, first)
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
