"""Cuts files into chunks, and reads a chunk's records one by one: no file needs to fit into memory."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from qlora_ray.data.files import DataFile
from qlora_ray.data.json_array import array_items
from qlora_ray.errors import BadRecord, DamagedFile

CHUNK_BYTES = 8 << 20  # of JSON Lines and Arrow
RECORDS_PER_BATCH = 1024
BLANK: Any = object()  # what stands for a blank line: no record, but a line to count
TEXT_BLOCK = 1 << 18

# Where a record is: its line in JSON Lines and CSV files, its number in others, both from 1 and within the chunk.
Located = tuple[int, Any]


@dataclass(frozen=True)
class Chunk:
    """A part of a file that one task reads."""

    file: DataFile
    start: int = 0  # bytes of JSON Lines, row groups of Parquet, record batches of Arrow
    stop: int | None = None  # None: to the end
    num_before: int | None = 0  # records of the file before it; None where lines have to be counted first


def cut(file: DataFile) -> list[Chunk]:
    """The chunks of a file, in order; of a slice those that hold some of it. Raises DamagedFile."""
    try:
        if file.kind == "parquet":
            return _overlapping(_cut_parquet(file), file.taken)
        if file.kind == "arrow":
            return _overlapping(_cut_arrow(file), file.taken)
        is_large = file.num_bytes > 2 * CHUNK_BYTES and not file.compression
        if file.kind == "json" and is_large and not file.taken and not is_array(file):
            starts = range(0, file.num_bytes - CHUNK_BYTES // 2, CHUNK_BYTES)
            return [
                Chunk(file, start, stop, None if start else 0)
                for start, stop in zip(starts, [*starts[1:], None], strict=True)
            ]
    except (OSError, pa.ArrowException) as error:
        raise DamagedFile(_first_line(error)) from error
    return [Chunk(file)]


def read(chunk: Chunk) -> Iterator[Located]:
    """(place, record) of each record of a chunk; the record is a BadRecord where it cannot be parsed, or BLANK.

    Of a slice, those of its records. Raises DamagedFile where the rest of the file cannot be read.
    """
    readers = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "arrow": _read_arrow}
    try:
        records = readers[chunk.file.kind](chunk)
        yield from records if chunk.file.taken is None else _of_slice(records, chunk, chunk.file.taken)
    except (OSError, pa.ArrowException, csv.Error, EOFError) as error:
        raise DamagedFile(_first_line(error)) from error


def count(file: DataFile) -> int:
    """Records of a whole file, bad ones too; blank lines are none. Raises DamagedFile."""
    try:
        if file.kind == "parquet":
            return sum(_row_groups(file))
        if file.kind == "arrow":
            with _arrow_file(file) as opened:
                return sum(batch.num_rows for batch in _batches(opened))
        if file.kind == "json" and not is_array(file):
            return sum(1 for line in _lines(Chunk(file)) if line.strip())
    except (OSError, pa.ArrowException, EOFError) as error:
        raise DamagedFile(_first_line(error)) from error
    return sum(1 for _, record in read(Chunk(file)) if record is not BLANK)


def _overlapping(chunks: list[Chunk], taken: tuple[int, int] | None) -> list[Chunk]:
    if taken is None:
        return chunks
    ends = [*(chunk.num_before or 0 for chunk in chunks[1:]), taken[1]]
    return [
        chunk for chunk, end in zip(chunks, ends, strict=True) if (chunk.num_before or 0) < taken[1] and end > taken[0]
    ]


def _of_slice(records: Iterator[Located], chunk: Chunk, taken: tuple[int, int]) -> Iterator[Located]:
    number = chunk.num_before or 0
    for place, record in records:
        if record is BLANK:
            continue
        if number >= taken[1]:
            return
        if number >= taken[0]:
            yield place, record
        number += 1


def place_unit(file: DataFile) -> str:
    """What a place counts in this file."""
    return "line" if file.kind == "csv" or (file.kind == "json" and not is_array(file)) else "record"


def is_array(file: DataFile) -> bool:
    """Whether a JSON file is one array, not lines."""
    with file.open_stream() as stream:
        while block := stream.read(4096).removeprefix(b"\xef\xbb\xbf"):
            if block.strip():
                return block.lstrip().startswith(b"[")
    return False


def _read_json(chunk: Chunk) -> Iterator[Located]:
    if chunk.start == 0 and is_array(chunk.file):
        with chunk.file.open_stream() as stream:
            text = _Text(stream)
            for number, item in enumerate(array_items(text), 1):
                yield number, item if text.is_utf8 or _is_utf8(item) else BadRecord("not UTF-8")
    else:
        for number, line in enumerate(_lines(chunk), 1):
            yield number, _parse_line(line) if line.strip() else BLANK


def _lines(chunk: Chunk) -> Iterator[bytes]:
    """Lines that begin in the chunk, whichever chunk they end in."""
    if chunk.start == 0 and chunk.stop is None:
        with chunk.file.open_stream() as raw:
            yield from io.BufferedReader(_Raw(raw), TEXT_BLOCK)
        return
    with chunk.file.filesystem.open_input_file(chunk.file.path) as raw:
        raw.seek(max(0, chunk.start - 1))
        file = io.BufferedReader(_Raw(raw), TEXT_BLOCK)
        position = chunk.start
        if chunk.start:
            position += len(file.readline()) - 1  # the rest of a line that began before, or the newline before us
        while chunk.stop is None or position < chunk.stop:
            line = file.readline()
            if not line:
                return
            position += len(line)
            yield line


class _Raw(io.RawIOBase):
    """A pyarrow stream as the raw file that Python's buffered reader wants: pyarrow's own readline is slow."""

    def __init__(self, stream):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRecord("not UTF-8", f"column {error.start + 1}")
    except json.JSONDecodeError as error:
        return BadRecord("not JSON", f"column {error.colno}: {error.msg}")
    except RecursionError:
        return BadRecord("the JSON is nested too deeply")


class _Text:
    """Decoded text in blocks. Bytes that are not UTF-8 become surrogates, so that one bad record stays one."""

    def __init__(self, stream):
        raw = io.BufferedReader(_Raw(stream))
        self._text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.is_utf8 = True  # so far

    def __iter__(self) -> "_Text":
        return self

    def __next__(self) -> str:
        block = self._text.read(TEXT_BLOCK)
        if not block:
            raise StopIteration
        self.is_utf8 = self.is_utf8 and _is_utf8(block)
        return block


def _is_utf8(value: Any) -> bool:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.isascii() or not re.search("[\udc80-\udcff]", text)


def _read_csv(chunk: Chunk) -> Iterator[Located]:
    csv.field_size_limit(sys.maxsize)
    with chunk.file.open_stream() as stream:
        raw = io.BufferedReader(_Raw(stream))
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter=chunk.file.separator)
        header = next(rows, [])
        line = rows.line_num
        for row in rows:
            if row:
                is_whole = len(row) == len(header)
                record = dict(zip(header, row, strict=False))
                yield line + 1, record if is_whole else BadRecord("not as many cells as the header has names")
            line = rows.line_num


def _cut_parquet(file: DataFile) -> list[Chunk]:
    sizes = _row_groups(file)
    before = [sum(sizes[:i]) for i in range(len(sizes))]
    return [Chunk(file, i, i + 1, number) for i, number in enumerate(before) if sizes[i]]


def _row_groups(file: DataFile) -> list[int]:
    """Records of each row group."""
    with file.filesystem.open_input_file(file.path) as opened:
        metadata = pa.parquet.ParquetFile(opened).metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _read_parquet(chunk: Chunk) -> Iterator[Located]:
    number = 0
    with chunk.file.filesystem.open_input_file(chunk.file.path) as opened:
        table = pa.parquet.ParquetFile(opened)
        for batch in table.iter_batches(RECORDS_PER_BATCH, row_groups=range(chunk.start, chunk.stop or 0)):
            for record in batch.to_pylist():
                number += 1
                yield number, record


def _cut_arrow(file: DataFile) -> list[Chunk]:
    chunks, start, size, number, first = [], 0, 0, 0, 0
    with _arrow_file(file) as opened:
        last = -1
        for last, batch in enumerate(_batches(opened)):
            size, number = size + batch.nbytes, number + batch.num_rows
            if size >= CHUNK_BYTES:
                chunks.append(Chunk(file, start, last + 1, first))
                start, size, first = last + 1, 0, number
    return chunks + ([Chunk(file, start, last + 1, first)] if start <= last else [])


def _read_arrow(chunk: Chunk) -> Iterator[Located]:
    number = 0
    with _arrow_file(chunk.file) as opened:
        for i, batch in enumerate(_batches(opened)):
            if i == chunk.stop:
                return
            if i >= chunk.start:
                for start in range(0, batch.num_rows, RECORDS_PER_BATCH):
                    for record in batch.slice(start, RECORDS_PER_BATCH).to_pylist():
                        number += 1
                        yield number, record


def _arrow_file(file: DataFile):
    if file.is_local and not file.compression:
        return pa.memory_map(file.path)
    return file.open_stream() if file.compression else file.filesystem.open_input_file(file.path)


def _batches(opened) -> Iterator[pa.RecordBatch]:
    is_file_format = opened.seekable() and opened.read(6) == b"ARROW1"
    if opened.seekable():
        opened.seek(0)
    if is_file_format:
        reader = pa.ipc.open_file(opened)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from pa.ipc.open_stream(opened)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
