"""Files of every kind to the same records, whole or in chunks; damage is told with its place."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora_ray.config import Config
from qlora_ray.data import read as read_module
from qlora_ray.data.read import BLANK, cut, read
from qlora_ray.data.sources import content_hash, find_sources
from qlora_ray.errors import BadRecord, ConfigError, DamagedFile

RECORDS = [{"instruction": f"Say {i}.", "input": "", "output": f"é京🙂 {i}" + ' "x",\n{[' * (i % 4)} for i in range(50)]

SPLITS = {"train": RECORDS[:40], "test": RECORDS[40:]}


def sources(train_file, **data):
    return find_sources(Config.model_validate({"data": {"train_file": train_file, **data}}), "train_file")


def records(train_file, **data) -> list:
    """Every record of every source, in order, blank lines left out."""
    files = [file for source in sources(train_file, **data) for file in source.files]
    return [r for file in files for chunk in cut(file) for _, r in read(chunk) if r is not BLANK]


def refusal(train_file, **data) -> str:
    with pytest.raises(ConfigError) as refused:
        sources(train_file, **data)
    return str(refused.value)


def as_lines(some) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in some).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def write_arrow(path, file_format: bool, batch_size: int = 7):
    table = pa.Table.from_pylist(RECORDS)
    with (pa.ipc.new_file if file_format else pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_size)
    return path


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(RECORDS)
    return path


WRITERS = {
    "array": lambda t: write(t / "x.json", json.dumps(RECORDS).encode()),
    "pretty array": lambda t: write(t / "x.json", json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()),
    "array with a byte order mark": lambda t: write(t / "x.json", b"\xef\xbb\xbf" + json.dumps(RECORDS).encode()),
    "lines": lambda t: write(t / "x.jsonl", as_lines(RECORDS)),
    "lines with blank ones and carriage returns": lambda t: write(
        t / "x.jsonl", b"\xef\xbb\xbf" + as_lines(RECORDS).replace(b"\n", b"\r\n\n")
    ),
    "lines without a last newline": lambda t: write(t / "x.jsonl", as_lines(RECORDS)[:-1]),
    "lines without an ending in the name": lambda t: write(t / "records", as_lines(RECORDS)),
    "gz": lambda t: write(t / "x.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
    "zst": lambda t: write(t / "x.jsonl.zst", zstd(as_lines(RECORDS))),
    "csv": lambda t: write_csv(t / "x.csv"),
    "tsv": lambda t: write_csv(t / "x.tsv"),
    "csv.gz": lambda t: write(t / "y.csv.gz", gzip.compress(write_csv(t / "x.csv").read_bytes())),
    "arrow stream": lambda t: write_arrow(t / "x.arrow", file_format=False),
    "arrow file": lambda t: write_arrow(t / "x.arrow", file_format=True),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_holds_the_same_records(kind, tmp_path):
    assert records(str(WRITERS[kind](tmp_path))) == RECORDS


def test_parquet_is_cut_at_row_groups(tmp_path):
    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "x.parquet", row_group_size=11)
    (source,) = sources(str(tmp_path / "x.parquet"))
    assert [chunk.num_before for chunk in cut(source.files[0])] == [0, 11, 22, 33, 44]
    assert records(str(tmp_path / "x.parquet")) == RECORDS


def test_nested_turns_come_out_of_parquet_as_they_went_in(tmp_path):
    turns = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    pa.parquet.write_table(pa.Table.from_pylist(turns), tmp_path / "x.parquet")
    assert records(str(tmp_path / "x.parquet")) == turns


@pytest.mark.parametrize("chunk_bytes", [1, 10, 64, 257, 1000, 5000])
def test_lines_cut_anywhere_are_each_read_once(chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(read_module, "CHUNK_BYTES", chunk_bytes)
    path = write(tmp_path / "x.jsonl", as_lines(RECORDS[:20]).replace(b"\n", b"\n\n", 3))
    (source,) = sources(str(path))
    chunks = cut(source.files[0])
    assert (len(chunks) > 1) == (path.stat().st_size > 2 * chunk_bytes)
    assert records(str(path)) == RECORDS[:20]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 50, 100_000])
def test_array_read_in_blocks_of_any_size_gives_the_same_items(block, tmp_path, monkeypatch):
    monkeypatch.setattr(read_module, "TEXT_BLOCK", block)
    items = [*RECORDS[:8], 12, -1.5e3, True, None, 'a\\"b', [], {}, [[1]]]
    for text in (json.dumps(items), json.dumps(items, indent=1), " [ ] ", "[1 ,2\n]"):
        path = write(tmp_path / "x.json", text.encode())
        assert records(str(path)) == json.loads(text)


def located_reasons(path) -> list[tuple[int, str, str]]:
    (source,) = sources(str(path))
    return [(place, str(r), r.detail) for place, r in read(cut(source.files[0])[0]) if isinstance(r, BadRecord)]


def test_a_bad_line_is_one_bad_record_with_line_and_column(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"a": 1}\n\n{"b": }\n{"c": "\xff"}\n' + b"[" * 100_000 + b"\n{}\n")
    # A file whose first character is [ is an array, so the deep one must not come first.
    assert located_reasons(path) == [
        (3, "not JSON", "column 7: Expecting value"),
        (4, "not UTF-8", "column 8"),
        (5, "the JSON is nested too deeply", ""),
    ]


def test_a_row_of_a_csv_file_that_lacks_cells_is_a_bad_record_with_its_line(tmp_path):
    path = write(tmp_path / "x.csv", b'a,b\n1,"two\nlines"\n3\n4,5\n')
    assert located_reasons(path) == [(4, "not as many cells as the header has names", "")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"a": 1},\n {"b" 2}]', "not JSON at line 2, column 7"),
        (b'[{"a": 1}\n {"b": 2}]', "not JSON at line 2, column 2: expected ','"),
        (b'[\n{"a": 1},\n{"b": 2}', "not JSON at line 3, column 9: the array does not end"),
        (b'[{"a": "x}]', "not JSON at line 1, column 8: Unterminated string"),
        (b"[1] [2]", "there is more after the end of the array"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("block", [3, 100_000])
def test_array_that_is_not_json_is_told_with_line_and_column(tmp_path, monkeypatch, content, said, block):
    monkeypatch.setattr(read_module, "TEXT_BLOCK", block)
    path = write(tmp_path / "x.json", content)
    with pytest.raises(DamagedFile) as damage:
        records(str(path))
    assert said in str(damage.value)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.arrow"])
def test_file_that_is_cut_off_is_told(name, tmp_path):
    path = tmp_path / name
    if name == "x.parquet":
        pa.parquet.write_table(pa.Table.from_pylist(RECORDS), path)
    elif name == "x.arrow":
        write_arrow(path, file_format=False)
    else:
        path.write_bytes(gzip.compress(as_lines(RECORDS)) if name.endswith("gz") else zstd(as_lines(RECORDS)))
    write(path, path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(DamagedFile):
        records(str(path))


def test_lists_globs_folders_and_uris_name_files_in_order(tmp_path):
    for i, name in enumerate(["b.jsonl", "a.json", "c.csv.gz", "_hidden.json", ".x.json", "notes.txt"]):
        content = as_lines([{"text": str(i)}]) if ".csv" not in name else gzip.compress(b"text\n2\n")
        write(tmp_path / name, content)
    in_order = [{"text": "1"}, {"text": "0"}, {"text": "2"}]
    assert records(str(tmp_path)) == in_order
    assert records(f"{tmp_path}/[ab].json*") == in_order[:2]
    assert records([f"{tmp_path}/b.jsonl", {"path": f"{tmp_path}/a.json", "weight": 2}]) == in_order[1::-1]
    assert records(f"file://{tmp_path}/b.jsonl") == in_order[1:2]


def test_fsspec_uri_is_read(tmp_path):
    import fsspec

    with fsspec.open("memory://some-records/part-1.jsonl", "wb") as file:
        file.write(as_lines(RECORDS))
    assert records("memory://some-records/part-1.jsonl") == RECORDS
    assert records("memory://some-records/part-*.jsonl") == RECORDS
    assert records("memory://some-records") == RECORDS


def test_saved_datasets_are_read_by_split(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list(RECORDS)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    both = datasets.DatasetDict({"train": one.select(range(40)), "test": one.select(range(40, 50))})
    both.save_to_disk(tmp_path / "both")
    assert records(str(tmp_path / "one")) == RECORDS
    assert records(str(tmp_path / "both")) == RECORDS[:40]
    assert records({"path": str(tmp_path / "both"), "split": "test"}["path"], split="test") == RECORDS[40:]
    assert records([{"path": str(tmp_path / "both"), "split": "test"}]) == RECORDS[40:]
    said = refusal(str(tmp_path / "both"), split="dev")
    assert "has no split 'dev'. Set data.split to one of: test, train" in said


def test_hub_data_set_is_read_from_what_the_hub_library_keeps(tmp_path, monkeypatch):
    import datasets

    asked = {}
    load = datasets.load_dataset
    files = {name: str(write(tmp_path / f"{name}.jsonl", as_lines(some))) for name, some in SPLITS.items()}

    def from_disk(path, name, *, revision):  # a hub that cannot be reached from here, without the network
        asked.update(path=path, name=name, revision=revision)
        return load("json", data_files=files, cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    assert records("someone/instructions", revision="abc") == SPLITS["train"]
    assert asked == {"path": "someone/instructions", "name": None, "revision": "abc"}
    assert records("someone/instructions", split="train[:25%]+test[-2:]") == SPLITS["train"][:10] + SPLITS["test"][-2:]
    assert "has no split 'dev'. Set data.split to one of: test, train." in refusal("someone/instructions", split="dev")


def test_hub_data_set_that_does_not_come_is_refused_by_name():
    assert refusal("someone/nothing-here").startswith("data.train_file=someone/nothing-here: no such file, and the hub")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no.json", "no such file"),
        ("no/such/folder/x.jsonl", "no such file"),
        ("no*.json", "no file matches"),
        ("memory://nowhere/x.json", "no such file"),
        ("nonsense://x/y.json", "Protocol not known"),
    ],
)
def test_what_is_not_there_is_refused_by_name(name, said):
    assert refusal(name).startswith(f"data.train_file={name}: ") and said in refusal(name)


def test_empty_file_and_folder_without_data_are_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "x.json", b"")
    assert refusal(str(tmp_path / "x.json")) == f"data.train_file={tmp_path}/x.json: the file is empty."
    assert "x.json: the file is empty" in refusal(str(tmp_path))
    assert "is a folder without data files" in refusal(str(tmp_path / "sub"))


def test_content_hash_changes_with_any_byte_and_nothing_else(tmp_path):
    path = write(tmp_path / "x.jsonl", as_lines(RECORDS))
    first = content_hash(sources(str(path))[0])
    path.touch()
    assert content_hash(sources(str(path))[0]) == first
    assert content_hash(sources(str(write(tmp_path / "y.jsonl", as_lines(RECORDS))))[0]) == first
    assert content_hash(sources(str(write(tmp_path / "y.csv", as_lines(RECORDS))))[0]) != first  # parsed otherwise
    write(path, as_lines(RECORDS)[:-3] + b"!\n\n")
    assert content_hash(sources(str(path))[0]) != first


def test_a_record_of_an_array_with_bytes_that_are_not_utf8_is_one_bad_record(tmp_path):
    path = write(tmp_path / "x.json", b'[{"a": "\xc3\xa9"}, {"\xff": 1}, {"b": ["\x80"]}, 3]')
    assert located_reasons(path) == [(2, "not UTF-8", ""), (3, "not UTF-8", "")]
    assert [r for r in records(str(path)) if not isinstance(r, BadRecord)] == [{"a": "é"}, 3]
