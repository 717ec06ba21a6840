"""Bad input at the door: exit code 2, one message that names the key, nothing left behind. Ray is never started."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_ray import train
from qlora_ray.cluster import connect
from qlora_ray.config import base_model_path

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


@pytest.fixture(autouse=True)
def ray_never_starts(monkeypatch):
    def start_ray(*_):
        raise AssertionError("Ray was about to start")

    monkeypatch.setattr(connect, "start_ray", start_ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def said(tmp_path, capsys):
    """Opens the door with overrides and returns its message, once nothing else has happened."""

    def open_door(*arguments: str) -> str:
        storage = tmp_path / "storage"
        assert train.main([f"ray.storage_path={storage}", "ray.num_workers=1", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in err
        assert not storage.exists()
        return err.removeprefix("error: ")

    return open_door


@pytest.fixture
def base(tmp_path) -> Path:
    """A copy of the embedded base, to be damaged."""
    return Path(shutil.copytree(base_model_path("embedded"), tmp_path / "base"))


def test_unknown_key(said):
    assert (
        said("training.lerning_rate=1") == "training.lerning_rate: unknown key. Did you mean training.learning_rate?\n"
    )


def test_missing_config_file(said, tmp_path):
    assert said("-c", f"{tmp_path}/no.yaml").startswith(f"-c {tmp_path}/no.yaml: no such file")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b'[{"instruction": "\xff"}]', "not UTF-8 (1x, first: record 1)"),
        (b'[{"instruction": "x"},\n{]', "not JSON at line 2, column 2"),
        (json.dumps([GOOD, {"instruction": "x"}]).encode(), "no `output` (1x, first: record 2)"),
        (json.dumps([{"instruction": "x"}]).encode(), "No record is left"),
        (b"[]", "holds no record"),
    ],
)
@pytest.mark.parametrize("key", ["data.train_file", "data.validation_file"])
def test_unusable_data_file(said, tmp_path, content, why, key):
    path = tmp_path / "records.json"
    if content is not None:
        path.write_bytes(content)
    message = said(f"{key}={path}")
    assert message.startswith(f"{key}={path}: ") and why in message


def test_folder_as_data_file(said, tmp_path):
    assert "is a folder" in said(f"data.train_file={tmp_path}")


def damage(base: Path, how: str) -> None:
    weights = base / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "pickle only":
        weights.rename(base / "pytorch_model.bin")
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "cut in header":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "header is a list":
        weights.write_bytes((2).to_bytes(8, "little") + b"[]")
    elif how == "shard missing":
        weights.unlink()
        (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    elif how == "no tokenizer":
        (base / "tokenizer.json").unlink()
    elif how == "no config":
        (base / "config.json").unlink()
    elif how == "config not JSON":
        (base / "config.json").write_text("{")
    elif how == "config a list":
        (base / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("no weights", "no weights (*.safetensors, or pytorch_model.bin)"),
        ("pickle only", "pytorch_model.bin cannot be read as weights alone"),
        ("cut off", "model.safetensors is damaged"),
        ("cut in header", "model.safetensors is damaged"),
        ("empty weights", "model.safetensors is damaged"),
        ("header is a list", "model.safetensors is damaged"),
        ("shard missing", "model-1-of-2.safetensors is missing"),
        ("no tokenizer", "no tokenizer (tokenizer.json)"),
        ("no config", "no config.json"),
        ("config not JSON", "config.json is not JSON"),
        ("config a list", "config.json does not hold a JSON object"),
    ],
)
def test_unusable_base_folder(said, base, how, why):
    damage(base, how)
    message = said(f"model.base_model={base}")
    assert message.startswith(f"model.base_model={base}: ") and why in message


def test_base_that_is_neither_folder_nor_hub_id(said):
    assert said("model.base_model=/no/such/folder").startswith("model.base_model=/no/such/folder: no such folder")


def test_run_name_with_a_path(said):
    assert said("ray.run_name=../x").startswith("ray.run_name=../x:")


def test_more_workers_than_cores(said):
    message = said("ray.num_workers=100000")
    assert message.startswith("ray.num_workers=100000: 100000 x 1 CPU") and "the cluster holds" in message


def test_global_batch_that_does_not_divide(said):
    message = said("training.batch_size=3", "training.global_batch_size=16", "ray.num_workers=4")
    assert message.startswith("training.batch_size=3: the global batch of 16") and "Nearest that work: 2, 4" in message


def test_storage_path_with_a_file_in_the_way(said, tmp_path):
    (tmp_path / "file").write_text("")
    assert "not writable" in said(f"ray.storage_path={tmp_path}/file/runs")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"{\n 1}", "not JSON at line 2, column 2"),
        (b"\xff", "not UTF-8 (byte 0)"),
        (b"[]", "must hold a JSON object"),
        (b'{"zero_optimization": {"stage": 1}}', "zero_optimization.stage=1 in the DeepSpeed JSON contradicts"),
        (b'{"zero_optimization": {"zero_quantized_weights": true}}', "quantizes the packed 4-bit bytes a second time"),
        (b'{"optimizer": {"type": "Adam"}}', "the optimizer comes from the YAML"),
    ],
)
def test_unusable_deepspeed_json(said, tmp_path, content, why):
    path = tmp_path / "deepspeed.json"
    if content is not None:
        path.write_bytes(content)
    assert why in said("--deepspeed", str(path))


def test_resume_without_a_run_or_checkpoint(said):
    assert said("--resume").startswith("--resume: no run named quickstart-<time>")
    assert "has no checkpoint" in said("--resume", "ray.run_name=x")


def refused_beside_a_run(tmp_path, capsys, *arguments) -> str:
    """The message about a run directory that is there already and stays as it is."""
    run = tmp_path / "runs" / "old"
    before = sorted((path, path.read_bytes()) for path in run.rglob("*") if path.is_file())
    assert train.main([f"ray.storage_path={run.parent}", "ray.run_name=old", "ray.num_workers=1", *arguments]) == 2
    assert sorted((path, path.read_bytes()) for path in run.rglob("*") if path.is_file()) == before
    assert list(run.parent.iterdir()) == [run]
    return capsys.readouterr().err


def test_existing_run_name_without_resume(tmp_path, capsys):
    (tmp_path / "runs" / "old").mkdir(parents=True)
    message = refused_beside_a_run(tmp_path, capsys)
    assert message.startswith("error: ray.run_name=old:") and "Add --resume" in message


def test_resume_of_a_run_with_broken_checkpoints_only(tmp_path, capsys):
    checkpoint = tmp_path / "runs" / "old" / "checkpoints" / "step_00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{")
    assert "its manifest is unreadable" in refused_beside_a_run(tmp_path, capsys, "--resume")


def test_debug_adds_the_traceback_and_keeps_the_exit_code(capsys):
    assert train.main(["--debug", "training.lerning_rate=1"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: training.lerning_rate")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["training.batch_size=0"], "training.batch_size=0"),
        (["data.train_file=no.json"], "data.train_file=no.json"),
        (["ray.num_workers=100000"], "ray.num_workers=100000"),
    ],
)
def test_process_ends_with_2_and_one_line(tmp_path, arguments, key):
    command = [sys.executable, "-m", "qlora_ray.train", f"ray.storage_path={tmp_path}/runs", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert ended.stderr.startswith(f"error: {key}: ") and len(ended.stderr.splitlines()) == 1
