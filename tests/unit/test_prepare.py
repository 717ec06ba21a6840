"""From files to cached rows: what is counted, held out, weighted, refused, and found again."""

import collections
import json
import threading

import numpy as np
import pytest

from qlora_ray.config import Config, base_model_path
from qlora_ray.data import read as read_module
from qlora_ray.data import samples as samples_module
from qlora_ray.data import work
from qlora_ray.data.check import check_records
from qlora_ray.data.examples import read_examples
from qlora_ray.data.prepare import prepare
from qlora_ray.data.rows import Rows
from qlora_ray.data.stats import Layout
from qlora_ray.data.tokenize import IGNORE_INDEX, Encoder, load_tokenizer
from qlora_ray.errors import ConfigError
from qlora_ray.storage import open_folder
from tests.unit.test_formats import GOOD, TURNS


def say(i: int) -> dict:
    return {"instruction": f"Say {i}.", "output": f"{i} " + "word " * (i % 7)}


@pytest.fixture
def write(tmp_path):
    """Writes records to a file and returns its path: JSON Lines by name, else an array."""

    def write_records(records, name="train.json") -> str:
        path = tmp_path / name
        lines = "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(lines if name.endswith("l") else json.dumps(records))
        return str(path)

    return write_records


@pytest.fixture
def prepared(tmp_path):
    """Prepares a training file with no validation, unless sections say otherwise."""

    def prepare_file(train_file, packing=False, **sections):
        asked = {"validation_split": 0, **sections.pop("data", {}), "train_file": train_file}
        config = Config.model_validate({**sections, "data": asked})
        return prepare(config, open_folder(str(tmp_path / "storage")), Layout(packing))

    return prepare_file


def rows_of(made, split="train") -> list[dict]:
    rows = Rows(made.entry, split)
    return rows.gather(np.arange(len(rows))).to_pylist() if len(rows) else []


def texts(made, split="train") -> list[str]:
    """What is trained on, row by row."""
    tokenizer = load_tokenizer(base_model_path("embedded"), None)
    return [tokenizer.decode([t for t in row["labels"] if t != IGNORE_INDEX]) for row in rows_of(made, split)]


def refusal(prepared, train_file, **sections) -> str:
    with pytest.raises(ConfigError) as refused:
        prepared(train_file, **sections)
    return str(refused.value)


def test_rows_are_what_the_encoder_makes_of_the_records(write, prepared):
    made = prepared(write([say(i) for i in range(30)] + [{"messages": TURNS}]))
    encoder = Encoder(load_tokenizer(base_model_path("embedded"), None), 512)
    wanted = [
        encoder.encode([[{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]])
        for r in map(say, range(30))
    ] + [encoder.encode([TURNS])]
    got = [(row["input_ids"], row["labels"]) for row in rows_of(made)]
    assert got == [(sample.input_ids, sample.labels) for ((sample,),) in wanted]
    assert made.stats.formats == {"alpaca": 30, "messages": 1}
    assert (made.stats.num_samples, made.stats.num_rows, made.stats.packed) == (31, 31, False)
    assert made.stats.num_tokens == sum(len(ids) for ids, _ in got)
    assert made.stats.num_label_tokens == sum(label != IGNORE_INDEX for _, labels in got for label in labels)
    assert made.stats.longest_row == max(len(ids) for ids, _ in got)


def test_packed_rows_hold_the_same_samples_side_by_side(write, prepared):
    path = write([say(i) for i in range(60)])
    alone, packed = prepared(path, training={"max_length": 64}), prepared(path, True, training={"max_length": 64})
    single = {tuple(row["input_ids"]): row["labels"] for row in rows_of(alone)}
    found = []
    for row in rows_of(packed):
        assert len(row["input_ids"]) <= 64
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            ids = tuple(row["input_ids"][start:end])
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start:end] == single[ids]
            found.append(ids)
    assert sorted(found) == sorted(single)
    assert packed.stats.num_rows < alone.stats.num_rows == packed.stats.num_samples == 60
    assert packed.stats.packing_efficiency == packed.stats.num_tokens / (64 * packed.stats.num_rows) > 0.8
    counts = Rows(packed.entry, "train")
    assert counts.num_label_tokens.sum() == alone.stats.num_label_tokens == packed.stats.num_label_tokens
    assert counts.num_tokens.tolist() == [len(row["input_ids"]) for row in rows_of(packed)]


def test_chunks_do_not_change_the_samples(write, prepared, monkeypatch):
    path = write([say(i) for i in range(50)], "x.jsonl")
    whole = prepared(path)
    monkeypatch.setattr(read_module, "CHUNK_BYTES", 200)
    monkeypatch.setattr(samples_module, "LAYOUT", "another, so that it is made anew")
    cut = prepared(path)
    assert len(cut.train[0].parts) > 5 and len(whole.train[0].parts) == 1
    assert rows_of(cut) == rows_of(whole) and cut.stats.num_tokens == whole.stats.num_tokens


def test_texts_that_are_held_at_once_are_few_where_they_are_long(write, prepared, monkeypatch):
    together, encode = [], Encoder.encode

    def spy(encoder, conversations):
        together.append(sum(len(turn["content"]) for turns in conversations for turn in turns))
        return encode(encoder, conversations)

    monkeypatch.setattr(work, "TEXT_AT_ONCE", 5000)
    monkeypatch.setattr(work, "TEXT_WITH_MESSAGES", 5000)
    monkeypatch.setattr(Encoder, "encode", spy)
    file = write([{"instruction": f"Say {i}.", "output": "word " * 400} for i in range(30)], "long.jsonl")
    made = prepared(file, training={"max_length": 4096})
    assert made.stats.num_rows == 30
    assert len(together) > 5 and max(together) < 5000 + 2100
    assert 0 < len(list(made.train[0].messages())) < 5


def test_rejected_records_are_kept_with_file_line_and_reason(write, prepared, monkeypatch, tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(say(i)) for i in range(40)]
    lines[7], lines[20], lines[30], lines[33] = '{"instruction": "x"}', "{oops", "", json.dumps("word")
    path.write_text("\n".join(lines))
    for chunk_bytes in (1 << 20, 150):
        monkeypatch.setattr(read_module, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(samples_module, "LAYOUT", chunk_bytes)
        made = prepared(str(path), data={"max_bad_fraction": 0.5})
        rejected = [json.loads(line) for line in made.train[0].rejected_lines().splitlines()]
        column = "Expecting property name enclosed in double quotes"
        assert rejected == [
            {"file": str(path), "line": 8, "reason": "no `output`"},
            {"file": str(path), "line": 21, "reason": "not JSON", "detail": f"column 2: {column}"},
            {"file": str(path), "line": 34, "reason": "the record is not a JSON object"},
        ]
        assert (made.stats.num_records, made.stats.num_rejected, made.stats.num_samples) == (39, 3, 36)


def test_too_many_bad_records_are_named_by_place_and_reason(write, prepared):
    path = write([GOOD, {"instruction": "x"}, GOOD, "word", {"instruction": "y"}])
    said = refusal(prepared, path)
    assert said.startswith(f"data.train_file={path}: 3 of 5 records cannot be used, data.max_bad_fraction allows 1%")
    assert "no `output` (2x, first: record 2)" in said and "not a JSON object (1x, first: record 4)" in said
    with pytest.raises(ConfigError) as early:
        check_records(Config.model_validate({"data": {"train_file": path}}))
    assert str(early.value) == said


def test_three_most_frequent_reasons_are_named(write, prepared):
    bad = [{"a": 1}] * 4 + [{"instruction": "x"}] * 3 + ["word"] * 2 + [{"messages": []}]
    said = refusal(prepared, write([GOOD, *bad]))
    assert said.endswith(
        "allows 1%: no format has these fields (4x, first: record 2); no `output` (3x, first: record 6); "
        "the record is not a JSON object (2x, first: record 9)."
    )


def test_bad_records_within_max_bad_fraction_are_left_out_and_counted(write, prepared):
    path = write([GOOD, {"instruction": "x"}, GOOD, GOOD])
    stats = prepared(path, data={"max_bad_fraction": 0.25}).stats
    assert (stats.num_records, stats.num_rejected, stats.num_rows) == (4, 1, 3)
    # The same cache entry, and another limit.
    assert "1 of 4" in refusal(prepared, path, data={"max_bad_fraction": 0.24})


def test_no_record_left_is_refused_even_if_all_may_be_bad(write, prepared):
    assert "No record is left" in refusal(prepared, write([{"instruction": "x"}]), data={"max_bad_fraction": 1})
    assert "holds no record" in refusal(prepared, write([], "empty.json"))


def test_prompts_longer_than_max_length_are_refused_by_number(write, prepared):
    path = write([GOOD, {"instruction": "word " * 50, "output": "x"}])
    said = refusal(prepared, path, training={"max_length": 40})
    assert "longer than training.max_length=40 tokens (1x, first: record 2)" in said


def test_large_source_is_refused_early_only_if_its_first_records_are_all_bad(write, monkeypatch):
    monkeypatch.setattr("qlora_ray.data.check.INLINE_BYTES", 10)
    monkeypatch.setattr("qlora_ray.data.check.PEEKED_RECORDS", 5)
    some_bad = write([{"a": 1}] * 4 + [GOOD] * 4, "some.jsonl")
    check_records(Config.model_validate({"data": {"train_file": some_bad}}))
    all_bad = write([{"a": 1}] * 5 + [GOOD], "all.jsonl")
    with pytest.raises(ConfigError, match="no format has these fields"):
        check_records(Config.model_validate({"data": {"train_file": all_bad}}))


@pytest.mark.parametrize("packing", [False, True])
def test_given_order_is_the_files_within_rows_and_over_them(write, prepared, packing):
    files = [write([say(i) for i in range(n, n + 20)], f"{n}.json") for n in (20, 0)]
    made = prepared(files, packing, data={"order": "given"}, training={"max_length": 64})
    said = [int(text.split()[0]) for row in texts(made) for text in row.split("<|end|>") if text]
    assert said == [*range(20, 40), *range(20)]
    assert made.stats.num_rows < 40 if packing else made.stats.num_rows == 40


@pytest.mark.parametrize("packing", [False, True])
def test_order_by_length_begins_with_the_longest_samples(write, prepared, packing):
    made = prepared(write([say(i) for i in range(40)]), packing, data={"order": "by_length", "validation_split": 0.2})
    rows = Rows(made.entry, "train")
    lengths = made.train[0].index()["num_tokens"][rows.samples_of(np.arange(len(rows)))]
    assert len(lengths) == 32 and lengths.tolist() == sorted(lengths, reverse=True)


def test_order_is_part_of_what_is_cached(write, prepared):
    path = write([say(i) for i in range(40)])
    entries = [prepared(path, True, data={"order": order}).entry.name for order in ("shuffled", "given", "by_length")]
    assert len(set(entries)) == 3
    assert prepared(path, True).entry.name == entries[0]


def test_held_out_records_are_not_trained_on(write, prepared):
    path = write([say(i) for i in range(40)])
    for packing in (False, True):
        made = prepared(path, packing, data={"validation_split": 0.25})
        train, held = " ".join(texts(made)).split("<|end|>"), " ".join(texts(made, "validation")).split("<|end|>")
        answers = {split: {t.split()[0] for t in some if t.strip()} for split, some in (("t", train), ("v", held))}
        assert len(answers["t"]) == 30 and len(answers["v"]) == 10 and not answers["t"] & answers["v"]
        prompts = json.loads((made.entry / "prompts.json").read_bytes())
        assert [p["prompt"] for p in prompts] == [f"Say {p['expected'].split()[0]}." for p in prompts]
        assert {p["expected"].split()[0] for p in prompts} == answers["v"]


def test_windows_of_a_long_text_stay_on_one_side_of_the_split(write, prepared):
    letters = "ABCDEFGHIJKLMNOPQRST"
    made = prepared(write([{"text": f"{c} " * 60} for c in letters]), training={"max_length": 32},
                    data={"validation_split": 0.3})  # fmt: skip
    seen = {split: {c for t in texts(made, split) for c in t if c in letters} for split in ("train", "validation")}
    assert len(seen["validation"]) == 6 and len(seen["train"]) == 14 and not seen["train"] & seen["validation"]
    assert made.stats.num_samples > 28


def test_validation_file_is_used_as_it_is(write, prepared):
    train, held = write([say(i) for i in range(9)]), write([say(i) for i in range(50, 53)], "held.json")
    made = prepared(train, data={"validation_file": held, "validation_split": 0.5})
    assert (made.stats.num_samples, made.stats.num_validation_samples) == (9, 3)
    assert [t.split()[0] for t in texts(made, "validation")] == ["50", "51", "52"]


def test_weights_say_how_often_a_record_comes_an_epoch(write, prepared):
    files = [write([say(100 * k + i) for i in range(20)], f"{k}.json") for k in (1, 2, 3, 4)]
    weights = [1.0, 2.0, 0.5, 1.25]
    mixture = [{"path": path, "weight": weight} for path, weight in zip(files, weights, strict=True)]
    made = prepared(mixture)
    times = collections.Counter(int(t.split()[0].removesuffix("<|end|>")) for t in texts(made))
    by_source = [sorted(times.get(100 * k + i, 0) for i in range(20)) for k in (1, 2, 3, 4)]
    assert by_source == [[1] * 20, [2] * 20, [0] * 10 + [1] * 10, [1] * 15 + [2] * 5]
    assert made.stats.num_samples == 20 + 40 + 10 + 25
    other = prepared(mixture, training={"seed": 1})
    assert texts(other) != texts(made) and other.stats.num_samples == made.stats.num_samples


def test_several_files_and_formats_are_one_data_set(write, prepared, tmp_path):
    turns = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    write([GOOD], "a.json"), write([turns], "b.jsonl"), write([{"prompt": "x", "completion": " y"}], "c.json")
    made = prepared(f"{tmp_path}/?.json*")
    assert made.stats.formats == {"alpaca": 1, "sharegpt": 1, "prompt_completion": 1}
    assert texts(made) == ["3<|end|>", "Ho<|end|>", " y<|end|>"]


def test_examples_for_measuring_are_the_rows_and_prompts_of_training(write, prepared):
    path = write([say(i) for i in range(12)] + [{"messages": TURNS}, {"text": "Once."}, {"instruction": "x"}])
    made = prepared(path, data={"max_bad_fraction": 0.1})
    encoder = Encoder(load_tokenizer(base_model_path("embedded"), None), 512)
    table, prompts = read_examples(path, "--file", encoder, max_bad_fraction=0.1)
    assert table.to_pylist() == rows_of(made)
    held = prepared(path, data={"validation_file": path, "max_bad_fraction": 0.1})
    assert prompts == json.loads((held.entry / "prompts.json").read_bytes()) and len(prompts) == 13
    with pytest.raises(ConfigError, match=f"--file={path}: 1 of 15 records cannot be used"):
        read_examples(path, "--file", encoder)


def test_cache_is_found_the_second_time_without_a_tokenizer(write, prepared, monkeypatch):
    path = write([GOOD] * 5)
    first = prepared(path, data={"validation_split": 0.2})
    monkeypatch.setattr("qlora_ray.data.work.open_tokenizer", None)
    assert prepared(path, data={"validation_split": 0.2}) == first


def test_new_seed_split_or_packing_does_not_tokenize_again(write, prepared, monkeypatch):
    path = write([say(i) for i in range(20)])
    first = prepared(path)
    monkeypatch.setattr("qlora_ray.data.samples.tokenize_chunk", None)
    others = [
        prepared(path, training={"seed": 5}),
        prepared(path, packing=True),
        prepared(path, data={"validation_split": 0.5}),
        prepared([{"path": path, "weight": 3}]),
    ]
    assert {other.train[0].entry for other in others} == {first.train[0].entry}
    assert len({other.entry for other in [first, *others]}) == 5


def test_whatever_changes_the_samples_changes_their_fingerprint(write, prepared, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def shape(record):\n    return record['messages']\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    path = write([{"messages": TURNS}] * 5)

    def entries():
        return [
            prepared(path),
            prepared(path, training={"max_length": 100}),
            prepared(path, data={"train_on": "last_turn"}),
            prepared(path, data={"chat_template": "chatml"}),
            prepared(path, data={"chat_template": str(tmp_path / "own.jinja")}),
            prepared(path, data={"format": "messages"}),
            prepared(path, data={"format": "own:shape"}),
            prepared(write([{"messages": TURNS}] * 6, "other.json")),
        ]

    first = entries()
    names = [made.train[0].entry.name for made in first]
    assert len(set(names)) == len(names) == len({made.stats.fingerprint for made in first})
    assert prepared(path, training={"learning_rate": 1e-5}).stats == first[0].stats

    (tmp_path / "own.py").write_text("def shape(record):\n    return record['messages'][-2:]\n")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}- {{ m.content }}{{ eos_token }}{% endfor %}")
    changed = [i for i, made in enumerate(entries()) if made.train[0].entry.name != names[i]]
    assert changed == [4, 6]


@pytest.mark.parametrize("damage", ["no manifest", "part cut", "part missing", "no rows' stats"])
def test_part_of_an_entry_is_not_taken_but_made_anew(write, prepared, damage):
    path = write([say(i) for i in range(5)])
    whole = prepared(path)
    before = rows_of(whole)
    samples, rows = whole.train[0].entry.path, whole.entry.path
    if damage == "no manifest":
        (whole.train[0].entry / "manifest.json").delete()
    elif damage == "part cut":
        with open(f"{samples}/part_000000.arrow", "r+b") as file:
            file.truncate(100)
    elif damage == "part missing":
        (whole.train[0].entry / "part_000000.arrow").delete()
    else:
        (whole.entry / "stats.json").delete()
        with open(f"{rows}/train.arrow", "wb") as file:
            file.write(b"half")
    again = prepared(path)
    assert again == whole and rows_of(again) == before


def test_crash_while_writing_leaves_nothing_that_is_taken_for_whole(write, prepared, monkeypatch):
    path = write([say(i) for i in range(30)], "x.jsonl")
    monkeypatch.setattr(read_module, "CHUNK_BYTES", 200)
    tokenize = samples_module.tokenize_chunk

    def crash(chunk, recipe, entry, number):
        if number == 3:
            raise KeyboardInterrupt
        return tokenize(chunk, recipe, entry, number)

    monkeypatch.setattr(samples_module, "tokenize_chunk", crash)
    with pytest.raises(KeyboardInterrupt):
        prepared(path)
    monkeypatch.setattr(samples_module, "tokenize_chunk", tokenize)
    made = prepared(path)
    assert [t.split()[0].removesuffix("<|end|>") for t in texts(made)] == [str(i) for i in range(30)]


def test_runs_that_prepare_the_same_data_at_once_all_get_it_whole(write, prepared, monkeypatch):
    from transformers import AutoTokenizer  # noqa: F401 - threads that import it first, all at once, find half of it

    path = write([say(i) for i in range(80)], "x.jsonl")
    monkeypatch.setattr(read_module, "CHUNK_BYTES", 300)
    made, failed = [], []

    def one():
        try:
            made.append((one_made := prepared(path, packing=True), rows_of(one_made)))
        except BaseException as error:  # a thread's errors would be lost
            failed.append(error)

    threads = [threading.Thread(target=one) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed and len(made) == 4
    assert all(other == made[0] for other in made)
    assert not [name for name in made[0][0].entry.list() if name.startswith(".")]


def test_folder_that_another_process_makes_just_now_is_listed(tmp_path):
    import pyarrow.fs

    from qlora_ray.storage import Folder

    class MadeJustThen:
        """Says that the folder is not there, once."""

        def __init__(self):
            self.looks = 0

        def get_file_info(self, selector):
            self.looks += 1
            if self.looks == 1:
                raise FileNotFoundError(2, "Cannot list directory")
            return pyarrow.fs.LocalFileSystem().get_file_info(selector)

    (tmp_path / "a").write_text("1")
    assert Folder(MadeJustThen(), str(tmp_path)).sizes() == {"a": 1}
    assert Folder(MadeJustThen(), str(tmp_path)).list() == ["a"]


def test_cache_on_an_object_store_is_read_from_a_local_copy(write, prepared, tmp_path, monkeypatch):
    import tempfile

    import pyarrow.fs
    from fsspec.implementations.memory import MemoryFileSystem

    from qlora_ray.storage import Folder

    path = write([say(i) for i in range(20)])
    local = prepared(path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remote = Folder(pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(MemoryFileSystem())), "bucket/runs")
    config = Config.model_validate({"data": {"train_file": path, "validation_split": 0}})
    made = prepare(config, remote, Layout(packing=False))
    assert rows_of(made) == rows_of(local) and made.stats == local.stats
    assert prepare(config, remote, Layout(packing=False)) == made


def test_tokenizer_of_a_hub_base_is_fingerprinted_by_its_downloaded_files(tmp_path, monkeypatch):
    import huggingface_hub

    from qlora_ray.data.prepare import make_recipe
    from qlora_ray.data.samples import recipe_hash

    def from_cache(base, name, revision):
        assert (base, revision) == ("someone/model", None)
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", from_cache)
    recipe = make_recipe(Config.model_validate({"model": {"base_model": "someone/model"}}))
    hashes = [recipe_hash(recipe)]
    for content in ("one", "two"):
        (tmp_path / "tokenizer.json").write_text(content)
        hashes.append(recipe_hash(recipe))
    assert len(set(hashes)) == 3 and recipe_hash(recipe) == hashes[-1]
