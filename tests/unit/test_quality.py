"""python -m qlora_ray.data --check: each kind of fault is found in a small file that has it, and only there."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_ray import show_data as door
from qlora_ray.config import base_model_path, find_file
from qlora_ray.data.faults import can_tell_mojibake
from qlora_ray.data.near import Groups, can_be_near, normalised, shingles
from qlora_ray.data.quality import KINDS
from qlora_ray.data.tokenize import load_tokenizer
from qlora_ray.model.untrained import NEVER_IN_TEXT, untrained_tokens

SAMPLE = find_file("data/sample_data.json")
EMBEDDED = base_model_path("embedded")
needs_datasketch = pytest.mark.skipif(not can_be_near(), reason="needs the extra check: datasketch")
needs_ftfy = pytest.mark.skipif(not can_tell_mojibake(), reason="needs the extra check: ftfy")
WORDS = (
    "red",
    "stone",
    "river",
    "lamp",
    "cloud",
    "apple",
    "horse",
    "winter",
    "green",
    "paper",
    "silver",
    "boat",
    "glass",
)


def say(n: int, length: int = 12) -> str:
    """A text of its own for each n."""
    return " ".join(random.Random(n).choices(WORDS, k=length))


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CLEAN = [chat(f"{n}? {say(n)}", say(100 + n)) for n in range(12)]


@pytest.fixture
def check(tmp_path, capsys):
    """Checks records, or the bytes of a file, and returns what was found."""

    def check_records(records, *more: str, name: str = "x.jsonl") -> dict:
        path = tmp_path / name
        content = records if isinstance(records, bytes) else "".join(json.dumps(r) + "\n" for r in records).encode()
        path.write_bytes(content)
        before = sorted(tmp_path.rglob("*"))
        arguments = [
            "--check",
            "--json",
            f"data.train_file={path}",
            "data.validation_split=0",
            "training.max_length=512",
            *more,
        ]
        assert door.main([*arguments, f"ray.storage_path={tmp_path}/runs"]) == 0
        assert path.read_bytes() == content and sorted(tmp_path.rglob("*")) == before
        return json.loads(capsys.readouterr().out)

    return check_records


def kinds(found: dict) -> dict[str, int]:
    """How many records of each kind of fault there are, where there are any; the embedded base knows few tokens."""
    return {
        kind: one["records"] for kind, one in found["findings"].items() if one["records"] and kind != "unseen_token"
    }


def lines(found: dict, kind: str) -> list[str]:
    return [example["place"] for example in found["findings"][kind]["examples"]]


def test_clean_records_show_no_fault(check):
    found = check(CLEAN)
    assert kinds(found) == {} and set(found["findings"]) == set(KINDS)
    assert (found["num_records"], found["num_usable"], found["num_validation"]) == (12, 12, 0)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("short", chat("Yes or no?", "7")),
        ("unfinished", chat("Code?", "Here:\n```python\nprint(1)\n")),
        ("unfinished", chat("Think.", "<think>so it is")),
        ("garbled", chat("Say it.", "a caf\ufffd in the park")),
        ("garbled", chat("Say it.", "it\u0080s a caf in the park")),
        ("rejected", {"instruction": "x"}),
        ("rejected", ["no object"]),
    ],
)
def test_a_fault_of_one_record_is_found_there_alone(check, kind, record):
    found = check([*CLEAN[:3], record, *CLEAN[3:]])
    assert kinds(found) == {kind: 1}
    assert lines(found, kind) == ["line 4"]
    assert found["findings"][kind]["share"] == 1 / 13


def test_closed_fences_and_thoughts_and_answers_in_other_scripts_are_no_fault(check):
    fine = [
        "```\nx\n```\nand then",
        "<think>so</think> it is",
        "東京は日本の首都です。",
        "Привет, как дела?",
        "naïve café — “so”",
    ]
    assert kinds(check([chat(f"{n}?", text) for n, text in enumerate(fine)])) == {}


@needs_ftfy
def test_utf8_read_as_latin1_is_found(check):
    texts = ["Tr\u00e8s bien, c\u2019est \u00e7a", "Gr\u00fc\u00dfe aus M\u00fcnchen", "\u20ac 5 f\u00fcr \u00c4pfel"]
    wrong = [text.encode().decode("cp1252", errors="ignore") for text in texts]
    assert kinds(check([chat(f"{n}?", text) for n, text in enumerate(texts)])) == {}
    assert kinds(check([chat(f"{n}?", text) for n, text in enumerate(wrong)])) == {"garbled": 3}


def test_copies_are_found_after_normalisation_and_counted_once_each(check):
    shouted = json.loads(json.dumps(CLEAN[2]).replace(CLEAN[2]["messages"][1]["content"], say(102).upper() + "  "))
    found = check([*CLEAN, CLEAN[0], shouted, CLEAN[0]])
    assert kinds(found) == {"duplicate": 3}
    assert lines(found, "duplicate") == ["line 13", "line 14", "line 15"]
    assert [example["why"] for example in found["findings"]["duplicate"]["examples"]] == [
        "like line 1", "like line 3", "like line 1"
    ]  # fmt: skip
    assert say(100) in found["findings"]["duplicate"]["examples"][0]["text"]


def test_one_question_with_different_answers_is_no_copy(check):
    assert kinds(check([chat("Tell me.", say(n)) for n in range(9)])) == {}


@needs_datasketch
def test_near_copies_are_found_and_texts_of_one_subject_are_not(check):
    long = say(7, 80)
    near = [chat("Tell it.", f"{long} ending {n}") for n in range(4)]
    found = check([*CLEAN, *near, CLEAN[1]])
    assert kinds(found) == {"near_duplicate": 3, "duplicate": 1}
    assert lines(found, "near_duplicate") == ["line 14", "line 15", "line 16"]
    assert found["findings"]["near_duplicate"]["examples"][0]["why"] == "like line 13"


@needs_datasketch
def test_records_of_one_system_prompt_are_not_near_copies(check):
    system = {"role": "system", "content": say(3, 100)}
    assert kinds(check([{"messages": [system, *record["messages"]]} for record in CLEAN])) == {}


@needs_datasketch
def test_near_copies_are_those_whose_word_sequences_overlap(check):
    changed = [10, 60]  # of 100 words: few leave most sequences, many do not
    base = [f"w{n}" for n in range(200)]
    records = [chat("x?", " ".join(base))]
    for count in changed:
        words = list(base)
        for place in range(count):
            words[place] = f"v{place}"
        records.append(chat("x?", " ".join(words)))
    sets = [set(shingles(normalised(f"x?\n{record['messages'][1]['content']}"))) for record in records]
    overlap = [len(sets[0] & one) / len(sets[0] | one) for one in sets[1:]]
    assert overlap[0] > 0.88 and overlap[1] < 0.6
    assert lines(check(records), "near_duplicate") == ["line 2"]


def test_held_out_records_that_are_in_training_are_found(check):
    twice = [record for record in CLEAN for _ in range(2)]
    found = check(twice, "data.validation_split=0.25")
    assert found["num_validation"] == 6
    leaked, copies = (found["findings"][kind]["records"] for kind in ("leaked", "duplicate"))
    both_held = (6 - leaked) // 2  # of twelve pairs each lies in training, in validation, or is split
    assert leaked > 0 and leaked + copies + both_held == 12


def test_records_of_a_validation_file_that_are_in_training_are_found(check, tmp_path):
    held = [chat("fresh?", say(500)), CLEAN[4], chat(CLEAN[5]["messages"][0]["content"], say(501))]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    found = check(CLEAN, f"data.validation_file={tmp_path}/held.jsonl")
    assert kinds(found) == {"leaked": 1, "leaked_prompt": 1}
    (leaked,), (prompt,) = (found["findings"][kind]["examples"] for kind in ("leaked", "leaked_prompt"))
    assert (leaked["place"], leaked["why"]) == (
        f"line 2 of {tmp_path}/held.jsonl",
        f"like line 5 of {tmp_path}/x.jsonl",
    )
    assert prompt["place"] == f"line 3 of {tmp_path}/held.jsonl"
    assert "leaked" not in found["not_checked"] and "leaked_prompt" not in found["not_checked"]


@needs_datasketch
def test_validation_records_that_are_nearly_in_training_are_found(check, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps(chat("Other?", f"{say(1, 120)} end")))
    found = check([*CLEAN, chat("Tell it.", say(1, 120))], f"data.validation_file={tmp_path}/held.jsonl")
    assert kinds(found) == {"leaked_nearly": 1}


def test_records_cut_by_max_length_are_counted_and_not_called_unclosed(check):
    found = check([*CLEAN, chat("Long?", say(1, 200)), chat("x " * 300, "too late")], "training.max_length=256")
    assert kinds(found) == {"cut": 1, "rejected": 1}
    assert lines(found, "cut") == ["line 13"]


def test_answers_without_a_trained_stop_are_found(check, tmp_path):
    template = tmp_path / "open.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA: {% else %}{{ m.content }}\n\n"
        "{% endif %}{% endfor %}"
    )
    turns = [*CLEAN[0]["messages"], *CLEAN[1]["messages"]]
    found = check([CLEAN[2], {"messages": turns}], f"data.chat_template={template}")
    assert kinds(found)["unclosed"] == 1 and lines(found, "unclosed") == ["line 2"]  # of two turns the first stays open


def test_what_the_template_leaves_out_is_found(check, tmp_path):
    tool = {"type": "function", "function": {"name": "clock", "description": "Tells it.", "parameters": {}}}
    found = check([CLEAN[0], {**CLEAN[1], "tools": [tool]}])
    assert kinds(found) == {"left_out": 1} and lines(found, "left_out") == ["line 2"]
    assert "tool" in found["findings"]["left_out"]["examples"][0]["why"]


def test_prompt_that_has_other_tokens_in_its_row_is_found(check):
    tokenizer = load_tokenizer(EMBEDDED, None)
    whole = next(w for w in ("person", "sentence", "capital", "lives") if len(tokenizer(w)["input_ids"]) == 1)
    records = [
        {"prompt": f"A {whole[:2]}", "completion": f"{whole[2:]} and more"},
        {"prompt": "A b. ", "completion": "And c."},
    ]
    found = check(records)
    assert kinds(found) == {"other_prompt": 1} and lines(found, "other_prompt") == ["line 1"]
    assert "alone" in found["findings"]["other_prompt"]["examples"][0]["why"]


@pytest.fixture
def base_with_new_tokens(tmp_path):
    """The embedded base with a row of zeros, and with two tokens beyond its embedding."""
    folder = tmp_path / "base"
    folder.mkdir()
    tokenizer = load_tokenizer(EMBEDDED, None)
    tokenizer.add_tokens(["Zyx1", "Zyx2"])
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_bytes(Path(EMBEDDED, "config.json").read_bytes())
    tensors = load_file(f"{EMBEDDED}/model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][tokenizer.convert_tokens_to_ids("red")] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tokens_that_the_corpus_of_the_embedded_base_lacks_are_told_by_its_embedding():
    tokenizer = load_tokenizer(EMBEDDED, None)
    untrained = {tokenizer.convert_ids_to_tokens(token) for token in untrained_tokens(EMBEDDED, tokenizer)}
    assert {"_", "@", "$", "\u00c0", "\u00ff", "<|pad|>"} <= untrained
    sample = json.loads(SAMPLE.read_text("utf-8"))
    read = {token for record in sample for text in record.values() for token in tokenizer.tokenize(text)}
    assert not read & untrained and not {"<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"} & untrained


def test_rows_of_zeros_and_missing_rows_are_untrained(base_with_new_tokens):
    tokenizer = load_tokenizer(str(base_with_new_tokens), None)
    new = untrained_tokens(str(base_with_new_tokens), tokenizer) - untrained_tokens(EMBEDDED, tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(sorted(new))) == {"red"}
    assert set(tokenizer.convert_tokens_to_ids(["Zyx1", "Zyx2"])) <= untrained_tokens(EMBEDDED, tokenizer)


def test_where_input_and_output_differ_short_rows_are_untrained(tmp_path):
    tokenizer = load_tokenizer(EMBEDDED, None)
    torch.manual_seed(0)
    matrix = torch.randn(len(tokenizer), 16)
    never = [tokenizer.convert_tokens_to_ids(chr(byte)) for byte in NEVER_IN_TEXT]
    matrix[[*never, 40, 41]] *= 0.01
    matrix[[41]] *= 0.1
    save_file({"model.embed_tokens.weight": matrix.to(torch.bfloat16)}, tmp_path / "model.safetensors")
    assert {41, *never} <= untrained_tokens(str(tmp_path), tokenizer) <= {40, 41, *never}
    save_file({"model.other.weight": matrix}, tmp_path / "model.safetensors")
    assert untrained_tokens(str(tmp_path), tokenizer) is None


def test_records_with_tokens_that_the_base_has_not_seen_are_found(check, base_with_new_tokens):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (base_with_new_tokens / "t.jinja").write_text(template)
    known = [chat(record["input"], record["output"]) for record in json.loads(SAMPLE.read_text("utf-8"))[:9]]
    records = [*known, chat("Name Zyx2", known[0]["messages"][1]["content"])]
    base, template = f"model.base_model={base_with_new_tokens}", f"data.chat_template={base_with_new_tokens}/t.jinja"
    found = check(records, base, template)
    assert lines(found, "unseen_token") == ["line 10"] and found["findings"]["unseen_token"]["records"] == 1
    assert found["findings"]["unseen_token"]["examples"][0]["why"] == "Zyx2"


MESSY = [
    b"not json {", b'{"a": 1}', b"", b"null", b"[1, 2]", b'"x"', b'{"messages": "x"}', b"\xff\xfe", b'{"text": ""}',
    b'{"messages": [{"role": "user"}]}', b'{"instruction": {"x": 1}, "output": 5}', b"[" * 200_000,
    b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x y"}]}',
    b'{"instruction": "esc", "output": "\\u001b[31mred and more"}',
]  # fmt: skip


def test_messy_file_is_counted_without_a_traceback(check, capsys):
    found = check(b"\n".join([*MESSY, *(json.dumps(record).encode() for record in CLEAN)]))
    assert kinds(found) == {"rejected": 12} and found["num_records"] == 25
    assert sum(found["rejected"].values()) == 12 and found["rejected"]["not JSON"] == 1


def test_text_shows_a_table_and_examples_and_steers_no_terminal(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*MESSY, MESSY[-1]]))
    arguments = ["--check", f"data.train_file={tmp_path}/x.jsonl", "data.validation_split=0"]
    assert door.main(arguments) == 0
    out = capsys.readouterr().out
    for expected in ("14 records", "cannot be used", "same as an earlier record", "like line 14", "not JSON"):
        assert expected in out
    assert "\x1b" not in out and "Traceback" not in out


@pytest.mark.parametrize("content", [b'[{"instruction": "a b", "output": "c d"}, {"x"', b"[]", b"\n\n"])
def test_file_that_ends_too_early_or_holds_nothing_is_told(check, content):
    found = check(content, name="x.json")
    assert kinds(found) == ({"damaged": 1} if b"x" in content else {})
    assert found["num_usable"] == (1 if b"x" in content else 0)


def test_lines_of_a_large_file_are_counted_from_its_start(check, monkeypatch):
    monkeypatch.setattr("qlora_ray.data.read.CHUNK_BYTES", 400)
    found = check([*CLEAN, chat("Yes?", "7"), *CLEAN])
    assert lines(found, "short") == ["line 13"] and lines(found, "duplicate") == ["line 14", "line 15", "line 16"]


def test_what_is_not_installed_is_told(check, monkeypatch):
    for name in ("datasketch", "ftfy"):
        monkeypatch.setitem(sys.modules, name, None)
    found = check([*CLEAN, CLEAN[0], chat("Say.", "a \ufffd b")])
    assert kinds(found) == {"duplicate": 1, "garbled": 1}
    assert found["not_checked"]["near_duplicate"] == 'datasketch is not installed: pip install "qlora_ray[check]"'
    assert found["not_checked"]["garbled"].startswith('ftfy is not installed: pip install "qlora_ray[check]"')


def test_file_that_is_not_there_is_refused(capsys):
    assert door.main(["--check", "data.train_file=no.json"]) == 2
    assert "data.train_file=no.json: no such file." in capsys.readouterr().err


def test_groups_are_those_of_equal_texts():
    groups = Groups()
    assert [groups.add(text) for text in "abacab"] == [0, 1, 0, 3, 0, 1]
    assert np.array_equal(groups.of(), [0, 1, 0, 3, 0, 1])
    assert normalised("  ＡＢＣ  ﬁn\n\tX ") == "abc fin x"


def test_scripts_without_spaces_are_compared_by_characters():
    assert len(shingles("我们今天去北京")) == 3
    assert len(shingles("one two three four five six")) == 2
    assert len(shingles("")) == len(shingles("one")) == 1
