"""python -m qlora_ray.data: what it shows is what the rows hold; what cannot be is refused as by the other doors."""

import json
from pathlib import Path

import pytest

from qlora_ray import cli
from qlora_ray import show_data as door
from qlora_ray.cluster import connect
from tests.unit.test_formats import GOOD, TURNS


@pytest.fixture(autouse=True)
def ray_never_starts(monkeypatch):
    def start_ray(*_):
        raise AssertionError("Ray was about to start")

    monkeypatch.setattr(connect, "start_ray", start_ray)


@pytest.fixture
def arguments(tmp_path):
    """Overrides for a file of chats, alpaca records and one bad record."""
    path = tmp_path / "x.jsonl"
    records = [{"messages": TURNS}] * 3 + [GOOD] * 5 + [{"instruction": "x"}]
    path.write_text("\n".join(map(json.dumps, records)))
    return [f"data.train_file={path}", "data.validation_split=0", "data.max_bad_fraction=0.5",
            "training.max_length=64", f"ray.storage_path={tmp_path}/runs"]  # fmt: skip


def shown(capsys, *arguments) -> dict:
    assert door.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_counts_that_add_up(capsys, arguments, tmp_path):
    data = shown(capsys, *arguments, "--rows", "100")
    assert (data["num_records"], data["num_rejected"], data["num_samples"]) == (9, 1, 8)
    assert data["formats"] == {"messages": 3, "alpaca": 5} and data["rejected"] == {"no `output`": 1}
    assert sum(one["samples"] for one in data["length_histogram"]) == 8
    assert sum(row["num_tokens"] for row in data["rows"]) == data["num_tokens"]
    assert sum(row["num_label_tokens"] for row in data["rows"]) == data["num_label_tokens"]
    assert data["label_share"] == data["num_label_tokens"] / data["num_tokens"]
    assert data["packing_efficiency"] == data["num_tokens"] / (64 * data["num_rows"])
    (file,) = data["rejected_files"]
    assert json.loads(Path(file).read_text()) == {"file": f"{tmp_path}/x.jsonl", "line": 9, "reason": "no `output`"}


def test_pieces_of_a_row_say_what_is_trained_on_and_where_samples_end(capsys, arguments):
    data = shown(capsys, *arguments, "--rows", "100")
    trained = [piece["text"] for row in data["rows"] for piece in row["pieces"] if piece["trained"]]
    assert sorted(trained) == sorted(["Kyoto, 京都.<|end|>", "Lima<|end|>"] * 3 + ["3<|end|>"] * 5)
    samples = [(i, piece["sample"]) for i, row in enumerate(data["rows"]) for piece in row["pieces"]]
    assert len(set(samples)) == 8
    others = "".join(piece["text"] for row in data["rows"] for piece in row["pieces"] if not piece["trained"])
    assert others.count("Name a city.") == 3 and others.count("Add.") == 5 and "Lima" not in others


def test_text_shows_formats_histogram_and_rows(capsys, arguments):
    assert cli.main(["data", *arguments]) == 0
    out = capsys.readouterr().out
    for expected in ("9 read, 1 rejected", "messages (3), alpaca (5)", "% full", "█ 3", "Kyoto, 京都.", "next sample",
                     "1 no `output`", "rejected.jsonl", "trained on"):  # fmt: skip
        assert expected in out


def test_rows_that_are_not_packed_are_called_padded(capsys, arguments):
    assert door.main([*arguments, "training.packing=false"]) == 0
    assert "8, one sample each, padded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train_file=no.json", "data.train_file=no.json: no such file."),
        ("data.format=chat", "data.format=chat: must be one of auto, alpaca, messages"),
        ("data.format=no.such:function", "data.format=no.such:function: cannot be imported"),
        ("data.chat_template=no.jinja", "data.chat_template=no.jinja: no such file"),
        ("data.max_bad_fraction=0.1", "1 of 9 records cannot be used"),
        ("data.train_file=[]", "must name at least one file"),
        ("data.train_file=[{path: x.json, weight: 0}]", "data.train_file.0.weight=0: input should be greater than 0"),
        ("data.train_file=[x.json, {path: y.json, wieght: 2}]", "data.train_file.1.wieght: unknown key"),
        ("data.train_file=5", "data.train_file=5: input should be a valid string"),
        ("model.base_model=/no/such", "no such folder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, arguments, override, said):
    assert door.main([*arguments, override]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and said in err
