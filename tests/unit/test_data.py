"""Records to rows: what is trained on, what is refused, what is cached."""

import copy
import json

import numpy as np
import pytest

from qlora_ray.config import Config, ConfigError, base_model_path
from qlora_ray.data import cache
from qlora_ray.data.formats import BadRecord, to_messages
from qlora_ray.data.prepare import check_records, prepare
from qlora_ray.data.read import read_records
from qlora_ray.data.stats import DataStats
from qlora_ray.data.tokenize import IGNORE_INDEX, PLAIN_TEMPLATE, Row, load_tokenizer, tokenize
from qlora_ray.storage import open_folder

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a city."},
    {"role": "assistant", "content": "Kyoto, 京都."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Lima"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(base_model_path("embedded"), None)


@pytest.fixture(scope="module")
def plain_tokenizer():
    loaded = load_tokenizer(base_model_path("embedded"), None)
    loaded.chat_template = PLAIN_TEMPLATE
    return loaded


@pytest.fixture
def train_file(tmp_path):
    """Writes records to a file and returns its path."""

    def write(records, name="train.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records))
        return path

    return write


def prepared(path, tmp_path, **sections):
    asked = {**sections, "data": {"train_file": str(path), "validation_split": 0, **sections.get("data", {})}}
    return prepare(Config.model_validate(asked), open_folder(str(tmp_path / "storage")))


def refusal(path, tmp_path, **sections) -> str:
    with pytest.raises(ConfigError) as refused:
        prepared(path, tmp_path, **sections)
    return str(refused.value)


def test_alpaca_record_becomes_a_question_and_an_answer():
    wanted = [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert to_messages(GOOD, "auto") == to_messages(GOOD, "alpaca") == wanted
    assert to_messages({**GOOD, "input": ""}, "auto")[0]["content"] == "Add."
    assert to_messages({**GOOD, "system": "Be exact."}, "auto")[0] == {"role": "system", "content": "Be exact."}


def test_messages_record_stays_as_it_is():
    assert to_messages({"messages": TURNS, "id": 7}, "auto") == TURNS


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "x"}, "no `output`"),
        ({"instruction": "x", "output": "  "}, "`output` is empty"),
        ({"instruction": 5, "output": "x"}, "`instruction` is empty or not a text"),
        ({**GOOD, "input": ["x"]}, "`input` is not a text"),
        ({**GOOD, "system": 5}, "`system` is empty or not a text"),
        ({**GOOD, "output": "\ud800"}, "surrogate"),
        ("text", "not a JSON object"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": TURNS[:2]}, "end with the assistant"),
        ({"messages": TURNS[2:3]}, "alternate"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "a turn is not"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": ""}]}, "an assistant turn is empty"),
    ],
)
def test_unusable_record_is_refused_with_the_reason(record, reason):
    with pytest.raises(BadRecord, match=reason):
        to_messages(record, "auto")


def test_labels_of_the_embedded_base_are_those_of_transformers_own_mask(tokenizer):
    theirs = tokenizer.apply_chat_template(TURNS, return_assistant_tokens_mask=True, return_dict=True)
    row = tokenize(tokenizer, TURNS, 512)
    assert row.input_ids == theirs["input_ids"]
    masked = [
        IGNORE_INDEX if not mask else token
        for token, mask in zip(row.input_ids, theirs["assistant_masks"], strict=True)
    ]
    assert row.labels == masked
    assert sum(label == tokenizer.eos_token_id for label in row.labels) == 2  # both closing tokens, no user's


def test_plain_template_trains_answers_and_their_closing_token_only(plain_tokenizer):
    row = tokenize(plain_tokenizer, TURNS, 512)
    trained = plain_tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])
    assert trained == "Kyoto, 京都.<|end|>Lima<|end|>"
    untrained = plain_tokenizer.decode(
        [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORE_INDEX]
    )
    assert "Name a city." in untrained and "Lima" not in untrained


def test_tokenizer_without_template_gets_the_plain_one(tmp_path):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(base_model_path("embedded"))
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), None).chat_template == PLAIN_TEMPLATE


def test_truncation_never_leaves_a_row_without_a_label(tokenizer):
    whole = tokenize(tokenizer, TURNS, 512)
    refused = 0
    for max_length in range(1, len(whole.input_ids) + 2):
        try:
            row = tokenize(tokenizer, TURNS, max_length)
        except BadRecord as reason:
            refused += 1
            assert f"training.max_length={max_length}" in str(reason)
            assert set(whole.labels[1:max_length]) <= {IGNORE_INDEX}
            continue
        assert any(label != IGNORE_INDEX for label in row.labels[1:])
        assert (row.input_ids, row.labels) == (whole.input_ids[:max_length], whole.labels[:max_length])
        assert row.truncated == (max_length < len(whole.input_ids))
    assert 0 < refused < len(whole.input_ids)


def test_too_many_bad_records_are_named_by_number_and_reason(train_file, tmp_path):
    path = train_file([GOOD, {"instruction": "x"}, GOOD, "word", {"instruction": "y"}])
    said = refusal(path, tmp_path)
    assert said.startswith(f"data.train_file={path}: 3 of 5 records cannot be used, data.max_bad_fraction allows 1%")
    assert "no `output` (2x, first: record 2)" in said and "not a JSON object (1x, first: record 4)" in said
    with pytest.raises(ConfigError) as early:
        check_records(
            Config.model_validate({"data": {"train_file": str(path)}}), open_folder(str(tmp_path / "storage"))
        )
    assert str(early.value) == said


def test_bad_records_within_max_bad_fraction_are_left_out_and_counted(train_file, tmp_path):
    path = train_file([GOOD, {"instruction": "x"}, GOOD, GOOD])
    stats = prepared(path, tmp_path, data={"max_bad_fraction": 0.25}).stats
    assert (stats.num_records, stats.num_rejected, stats.num_rows) == (4, 1, 3)
    assert "1 of 4" in refusal(path, tmp_path, data={"max_bad_fraction": 0.24})


def test_no_record_left_is_refused_even_if_all_may_be_bad(train_file, tmp_path):
    path = train_file([{"instruction": "x"}])
    assert "No record is left" in refusal(path, tmp_path, data={"max_bad_fraction": 1})
    assert "holds no record" in refusal(train_file([], "empty.json"), tmp_path)


def test_prompts_longer_than_max_length_are_refused_by_number(train_file, tmp_path):
    path = train_file([GOOD, {"instruction": "word " * 50, "output": "x"}])
    said = refusal(path, tmp_path, training={"max_length": 40})
    assert "longer than training.max_length=40 tokens (1x, first: record 2)" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"a": 1},\n {"b" 2}]', "not JSON at line 2, column 7"),
        (b'{"a": 1}\n\n{"b": }\n', "not JSON at line 3, column 7"),
        (b'[{"a": "x"},\n {"a": "\xff"}]', "not UTF-8 at line 2, column 9"),
        ("[]".encode("utf-16"), "not UTF-8 at line 1, column 1"),
        (b" \n", "the file is empty"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_file_that_is_not_json_in_utf8_is_refused_with_line_and_column(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_records(path)
    assert str(refused.value).startswith(f"data.train_file={path}: ") and said in str(refused.value)


def test_array_lines_and_byte_order_mark_read_alike(tmp_path):
    texts = ['[{"a": "é"}, {"a": 2}]', '{"a": "é"}\r\n\n{"a": 2}\n', '\ufeff[{"a": "é"},\n{"a": 2}]']
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_bytes(text.encode())
        assert read_records(tmp_path / str(number)) == [{"a": "é"}, {"a": 2}]


def test_cache_is_found_the_second_time_without_a_tokenizer(train_file, tmp_path, monkeypatch):
    path = train_file([GOOD] * 5)
    first = prepared(path, tmp_path)
    monkeypatch.setattr("qlora_ray.data.prepare.load_tokenizer", None)
    assert prepared(path, tmp_path) == first


def test_whatever_changes_the_rows_changes_the_fingerprint(train_file, tmp_path):
    first = train_file([GOOD] * 5)
    entries = [
        prepared(first, tmp_path),
        prepared(first, tmp_path, training={"max_length": 100}),
        prepared(first, tmp_path, data={"validation_split": 0.2}),
        prepared(first, tmp_path, data={"validation_split": 0.2}, training={"seed": 9}),
        prepared(train_file([GOOD] * 6, "other.json"), tmp_path),
    ]
    assert len({entry.stats.fingerprint for entry in entries}) == len(entries)
    assert prepared(first, tmp_path, training={"learning_rate": 1e-5}).stats == entries[0].stats


def test_half_written_cache_is_not_taken_but_made_anew(train_file, tmp_path):
    path = train_file([GOOD] * 5)
    whole = prepared(path, tmp_path)
    folder = tmp_path / "storage" / "cache" / whole.stats.fingerprint
    (folder / "stats.json").unlink()
    (folder / "train.arrow").write_bytes(b"half")
    folder.with_name(f".{folder.name}.0123abcd").mkdir()
    assert cache.find(open_folder(str(folder.parent)), folder.name) is None
    cache.open_rows.cache_clear()
    again = prepared(path, tmp_path)
    assert again.stats == whole.stats and cache.open_rows(again.entry, "train").num_rows == 5


def test_a_second_writer_of_the_same_rows_leaves_the_first_entry(train_file, tmp_path):
    whole = prepared(train_file([GOOD] * 5), tmp_path)
    folder = open_folder(str(tmp_path / "storage" / "cache"))
    before = (whole.entry / "train.arrow").read_bytes()
    cache.write(folder, whole.stats, {"train": [], "validation": []}, [])
    assert (whole.entry / "train.arrow").read_bytes() == before and folder.list() == [whole.stats.fingerprint]


def test_held_out_records_are_not_trained_on(train_file, tmp_path):
    path = train_file([{"instruction": f"Say {i}.", "output": str(i)} for i in range(20)])
    made = prepared(path, tmp_path, data={"validation_split": 0.25})
    rows = {
        name: set(map(tuple, cache.open_rows(made.entry, name)["input_ids"].to_pylist()))
        for name in ("train", "validation")
    }
    assert (len(rows["train"]), len(rows["validation"])) == (15, 5) and not rows["train"] & rows["validation"]
    prompts = json.loads((made.entry / "prompts.json").read_bytes())
    assert [prompt["prompt"] for prompt in prompts] == [f"Say {prompt['expected']}." for prompt in prompts]


def test_label_tokens_per_row_equals_a_naive_count(train_file, tmp_path):
    records = [{"instruction": f"Say {i}.", "output": "word " * (i + 1)} for i in range(12)]
    made = prepared(train_file(records), tmp_path, training={"max_length": 24}, data={"max_bad_fraction": 0.5})
    labels = cache.open_rows(made.entry, "train")["labels"].to_pylist()
    naive = [sum(label != IGNORE_INDEX for label in row[1:]) for row in labels]
    assert np.array_equal(cache.label_tokens_per_row(made.entry, "train"), naive)
    assert made.stats.num_label_tokens == sum(naive) and made.stats.num_truncated > 0


def test_first_token_of_a_row_is_never_counted_since_nothing_predicts_it(plain_tokenizer, tmp_path):
    rows = [Row([5, 6, 7], [5, 6, 7], False), Row([8, 9], [IGNORE_INDEX, 9], False)]
    folder = open_folder(str(tmp_path))
    cache.write(folder, DataStats("key", 2, 0, 0, 2, 0, 5, 3, 3), {"train": rows}, [])
    assert cache.label_tokens_per_row(folder / "key", "train").tolist() == [2, 1]
    with pytest.raises(BadRecord):  # of the two turns only the answer's first token is left, at the row's start
        answer_only = "{% for message in messages if message.role == 'assistant' %}{{ message.content }}{% endfor %}"
        plain_tokenizer = copy.deepcopy(plain_tokenizer)
        plain_tokenizer.chat_template = answer_only
        tokenize(plain_tokenizer, TURNS[1:3], max_length=1)
