"""Labelled answers: what a row holds, what is refused, and whole runs, whoever computes them."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_ray.config import Config
from qlora_ray.data.pairs import convert, label_of
from qlora_ray.data.prepare import prepare
from qlora_ray.data.rows import Rows
from qlora_ray.data.stats import Layout
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.errors import BadRecord, ConfigError
from qlora_ray.storage import open_folder
from qlora_ray.worker.batches import apart, to_tensors
from tests.integration import door


def records(count: int = 30) -> list[dict]:
    pairs = [json.loads(line) for line in Path("data/preferences_sample.jsonl").read_text().splitlines()]
    return [
        {
            "prompt": [{"role": "user", "content": " ".join(filter(None, (pair["instruction"], pair.get("input"))))}],
            "completion": [{"role": "assistant", "content": pair["chosen" if number % 2 else "rejected"]}],
            "label": bool(number % 2),
        }
        for number, pair in enumerate(pairs[:count])
    ]


def prepared(tmp_path, of_file: list[dict], packing: bool = True):
    (tmp_path / "labelled.json").write_text(json.dumps(of_file))
    data = {"train_file": str(tmp_path / "labelled.json"), "validation_split": 0.2}
    config = Config.model_validate({"data": data, "training": {"objective": "kto", "max_length": 128}})
    return prepare(config, open_folder(str(tmp_path / "storage")), Layout(packing))


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_has_answers_and_as_many_others_behind_their_prompts(packing, tmp_path):
    made = prepared(tmp_path, records(), packing)
    rows = Rows(made.entry, "train")
    table = rows.gather(np.arange(len(rows)))
    answers, others = (to_tensors(half, 0, torch.device("cpu")) for half in apart(table))
    assert len(answers["places"]) == len(others["places"]) == made.stats.num_samples == 24
    assert sorted([*answers["places"].tolist(), *others["places"].tolist()]) == list(range(48))
    assert set(answers["is_desirable"].tolist()) == {True, False}
    said = []
    for batch in (answers, others):
        ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        parts = torch.split(ids[batch["label_places"] + 1], batch["label_counts"].tolist())
        assert all(int(label) == IGNORE_INDEX or label == token for token, label in zip(ids, labels, strict=True))
        said.append([tuple(part.tolist()) for part in parts])
    assert sorted(said[0]) == sorted(said[1]) and all(a != b for a, b in zip(*said, strict=True))
    assert made.stats.longest_row == max(map(len, table["input_ids"].to_pylist())) <= 128
    assert made.stats.num_tokens == sum(map(len, table["input_ids"].to_pylist()))


def test_each_shape_of_a_labelled_record_is_read():
    asked, said = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}
    for record in (
        {"prompt": [asked], "completion": [said], "label": True},
        {"messages": [asked, said], "label": True},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}], "kto_tag": True},
        {"instruction": "Hi?", "output": "Ho.", "label": 1},
    ):
        messages, _ = convert(record, "auto", "labels")
        assert messages[:-1] == [asked, said] and label_of(messages) is True
    messages, _ = convert({"prompt": "Hi?", "completion": " Ho.", "label": False}, "auto", "labels")
    assert label_of(messages) is False and messages[1]["content"] == " Ho."
    for label in ({}, {"label": "good"}, {"label": None}, {"label": 2}):
        with pytest.raises(BadRecord, match="`label`"):
            convert({"prompt": "Hi?", "completion": "Ho."} | label, "auto", "labels")


def test_answers_of_one_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="all 24 answers are desirable"):
        prepared(tmp_path, [{**record, "label": True} for record in records()])


def settings(folder: Path, name: str, num_workers: int) -> list[str]:
    return [
        "-c", "configs/dpo.yaml", "training.objective=kto", "training.rpo_alpha=0",
        f"data.train_file={folder}/kto.json", f"ray.storage_path={folder}", f"ray.run_name={name}",
        f"ray.num_workers={num_workers}", f"training.gradient_accumulation_steps={4 // num_workers}",
        "ray.resources_per_worker={CPU: 0.5}",
        "training.max_steps=6", "logging.every_steps=1", "training.eval_every_steps=2", "checkpoint.every_steps=2",
        "evaluation.num_prompts=0", "model.lora_r=8",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "kto.json").write_text(json.dumps(records(60)))
    ended = door.run(*settings(folder, "two", 2))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.mark.parametrize("num_workers", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 4))])
def test_workers_that_were_killed_and_resumed_end_with_the_bits_of_two(num_workers, folder):
    name = f"killed-{num_workers}"
    arguments = settings(folder, name, num_workers)
    process = door.start(*arguments)
    door.wait_for_step(folder / name, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = door.run(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    ended = (folder / name / "adapter" / "adapter_model.safetensors" for name in ("two", name))
    assert len(set(map(door.sha256, ended))) == 1


def test_metrics_have_trls_names(folder):
    lines = [json.loads(line) for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"} <= logged[-1].keys()
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-5)  # two passes over the same weights, in rows of other lengths
    assert logged[0]["loss"] == pytest.approx(0.5)
    assert any("eval_rewards/margins" in line and "eval_kl" in line for line in lines)
