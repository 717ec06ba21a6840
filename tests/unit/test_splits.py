"""A split names files and a slice names records, as `datasets` would read them; what it does not name is not read."""

import json
import random

import datasets
import datasets.data_files
import pyarrow as pa
import pyarrow.parquet
import pytest

from qlora_ray.config import Config, DataSource
from qlora_ray.data import read as read_module
from qlora_ray.data.read import BLANK, cut, read
from qlora_ray.data.sources import content_hash, find_source, find_sources
from qlora_ray.data.splits import splits_by_name
from qlora_ray.errors import ConfigError

datasets.disable_progress_bars()
RECORDS = [{"n": n} for n in range(130)]


def sources(key="train_file", **data):
    return find_sources(Config.model_validate({"data": data}), key)


def numbers(key="train_file", **data) -> list[int]:
    """`n` of each record that is read, in order."""
    files = [file for source in sources(key, **data) for file in source.files]
    return [r["n"] for file in files for chunk in cut(file) for _, r in read(chunk) if r is not BLANK]


def refusal(key="train_file", **data) -> str:
    with pytest.raises(ConfigError) as refused:
        sources(key, **data)
    return str(refused.value)


def write(path, some=RECORDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(some), path, row_group_size=10)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(some)
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif path.suffix == ".csv":
        path.write_text("n\n" + "".join(f"{record['n']}\n" for record in some))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in some))
    return str(path)


SLICES = ("train", "train[:10%]", "train[10:20]", "train[-5:]", "train[:-90]", "train[33%:66%]", "train[95:400]",
          "train[:10%]+train[-10%:]", "train[50%:]+train[:3]", "train[:25%](pct1_dropremainder)")  # fmt: skip


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.arrow", "x.csv"])
@pytest.mark.parametrize("spec", SLICES)
def test_slice_of_a_file_is_what_datasets_reads(tmp_path, name, spec, monkeypatch):
    monkeypatch.setattr(read_module, "CHUNK_BYTES", 100)
    path = write(tmp_path / name)
    if name == "x.json":
        (tmp_path / name).write_text(json.dumps(RECORDS))
    datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)).save_to_disk(tmp_path / "saved")
    kind = name.split(".")[1].removesuffix("l")
    theirs = datasets.load_dataset(kind, data_files=path, split=spec, cache_dir=str(tmp_path / "cache"))["n"]
    assert [int(n) for n in numbers(train_file=path, split=spec)] == list(theirs)
    assert numbers(train_file=str(tmp_path / "saved"), split=spec) == list(theirs)


def test_slice_counts_over_the_files_of_a_glob_and_skips_blank_lines(tmp_path):
    write(tmp_path / "a.jsonl", RECORDS[:10])
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(record) for record in RECORDS[10:20]) + "\n\n")
    assert numbers(train_file=str(tmp_path / "*.jsonl"), split="train[8:13]") == [8, 9, 10, 11, 12]
    entry = {"path": str(tmp_path / "*.jsonl"), "split": "train[:50%]"}
    assert numbers(train_file=[entry, entry["path"]], split="train[-1:]") == [*range(10), 19]


def test_places_of_a_slice_are_those_of_the_whole_file(tmp_path):
    for name in ("x.jsonl", "x.parquet", "x.arrow"):
        (source,) = sources(train_file=write(tmp_path / name), split="train[55:57]")
        chunks = cut(source.files[0])
        places = [(place + (chunk.num_before or 0), record["n"]) for chunk in chunks for place, record in read(chunk)]
        assert places == [(56, 55), (57, 56)]


def test_slices_of_one_file_have_hashes_of_their_own(tmp_path):
    path = write(tmp_path / "x.jsonl")
    hashes = [content_hash(sources(train_file=path, split=s)[0]) for s in ("train", "train[:9]", "train[9:]")]
    assert len(set(hashes)) == 3
    assert content_hash(sources(train_file=path, split="train[:100%]")[0]) == hashes[0]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("test", "has no split 'test'. Set data.split to one of: train."),
        ("test[:10%]", "has no split 'test'. Set data.split to one of: train."),
        ("train[:10%", "Unrecognized instruction format: train[:10%"),
        ("train[:1.5%]", "Unrecognized instruction format"),
        ("train[:200%]", "data.split=train[:200%]: "),
        ("train[5:5]", "takes none of 130 records"),
    ],
)
def test_split_that_a_file_does_not_have_is_refused(tmp_path, spec, said):
    path = write(tmp_path / "x.jsonl")
    assert refusal(train_file=path, split=spec).startswith(f"data.train_file={path}: ")
    assert said in refusal(train_file=path, split=spec)


LAYOUTS = (
    ("train.jsonl", "test.jsonl"),
    ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/extra-00000-of-00001.parquet"),
    ("train/a.jsonl", "train/b.jsonl", "dev/a.jsonl", "c.jsonl"),
    ("my_train_file.jsonl", "my.val.jsonl", "latest.jsonl", "trainer.jsonl"),
    ("en-train/x.jsonl", "en-testing/x.jsonl", "train.jsonl"),
    ("data/a/training/x.csv", "data/a/evaluation 2/x.csv"),
    ("train1.jsonl", "train2.jsonl", "eval.jsonl"),
    ("a.jsonl", "sub/b.jsonl"),
    ("Train.jsonl", "TEST.jsonl"),
)


def assert_splits_are_those_of_datasets(folder, names):
    for name in names:
        write(folder / name, RECORDS[:1])
    patterns = datasets.data_files.get_data_patterns(str(folder))
    theirs = {
        split: sorted({path for one in some for path in matching(folder, one)}) for split, some in patterns.items()
    }
    assert (splits_by_name(sorted(names)) or {"train": sorted(names)}) == theirs


def matching(folder, pattern: str) -> list[str]:
    try:
        found = datasets.data_files.resolve_pattern(pattern, str(folder))
    except FileNotFoundError:
        return []
    return [path.removeprefix(f"{folder}/") for path in found]


@pytest.mark.parametrize("names", LAYOUTS)
def test_files_of_each_split_of_a_folder_are_those_that_datasets_finds(tmp_path, names):
    assert_splits_are_those_of_datasets(tmp_path, names)


@pytest.mark.parametrize("case", range(60))
def test_files_of_random_layouts_are_those_that_datasets_finds(tmp_path, case):
    draw = random.Random(case)
    words = ["train", "training", "val", "valid", "dev", "test", "eval", "x", "data", "1"]
    names = set()
    for _ in range(4):
        parts = [draw.choice("-_. ").join(draw.choices(words, k=draw.randint(1, 2))) for _ in range(2)]
        names.add("/".join(parts[: draw.randint(1, 2)]) + ".jsonl")
    assert_splits_are_those_of_datasets(tmp_path, names)


def test_split_of_a_folder_reads_its_files_alone_and_tells_of_the_others(tmp_path):
    for split, n in (("train", 0), ("validation", 1), ("test", 2)):
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [{"n": n}])
    folder = str(tmp_path)
    assert numbers(train_file=folder) == [0]
    assert numbers(train_file=folder, split="test+train") == [2, 0]
    assert numbers("validation_file", train_file=folder, validation_file=folder) == [1]
    assert numbers("validation_file", validation_file={"path": folder, "split": "test"}) == [2]
    (source,) = sources(train_file=folder)
    assert source.note.startswith(f"data.train_file={folder}: split train has 1 of its files; not read: ")
    assert "test-00000-of-00001.parquet" in source.note and "validation-00000-of-00001.parquet" in source.note
    assert "has no split 'dev'. Set data.split to one of: test, train, validation" in refusal(
        train_file=folder, split="dev"
    )
    with pytest.raises(ConfigError, match="holds the splits test, train, validation. Name the files of one of them"):
        find_source(DataSource(path=folder), "--file")


def test_folder_and_file_without_split_names_are_one_split_for_either_key(tmp_path):
    write(tmp_path / "a.jsonl", RECORDS[:3])
    for path in (str(tmp_path), str(tmp_path / "a.jsonl")):
        assert numbers(train_file=path) == numbers("validation_file", validation_file=path) == [0, 1, 2]
        some = {"path": path, "split": "validation[:1]"}
        assert numbers("validation_file", validation_file=some) == [0]
        assert "has no split 'validation'" in refusal(train_file=some)
        assert sources(train_file=path)[0].note is None
        assert [file.taken for file in find_source(DataSource(path=path), "--file").files] == [None]


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/part-*}
  - {split: test, path: [main/held/**, "main/?.jsonl"]}
- config_name: other
  data_dir: other
---
# A data set
"""


def test_configurations_in_a_folders_readme_are_followed(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    names = ["main/part-1.jsonl", "main/held/deep/x.jsonl", "main/y.jsonl", "other/train.jsonl", "other/test.jsonl"]
    for n, name in enumerate(names):
        write(tmp_path / name, [{"n": n}])
    folder = str(tmp_path)
    assert "has no configuration None. Set name to one of: main, other." in refusal(train_file=folder)
    named = {"path": folder, "name": "main"}
    assert numbers(train_file=named) == [0] and numbers(train_file=[named], split="test") == [1, 2]
    assert numbers(train_file={"path": folder, "name": "other", "split": "test"}) == [4]
    theirs = datasets.load_dataset(folder, "main", split="test", cache_dir=str(tmp_path / ".cache"))["n"]
    assert sorted(theirs) == [1, 2]


def test_settings_of_the_hub_are_refused_where_nothing_comes_from_it(tmp_path):
    path = write(tmp_path / "x.jsonl")
    assert "name=main is for hub data sets" in refusal(train_file={"path": path, "name": "main"})
    assert "revision=abc is for hub data sets" in refusal(train_file={"path": path, "revision": "abc"})
    assert "name=main is for hub data sets" in refusal(train_file={"path": str(tmp_path), "name": "main"})
    assert refusal(train_file=path, revision="abc").startswith("data.revision=abc: no file named here is a hub")
