"""python -m qlora_ray.init: what it writes trains without a change, for every base with every shape of data."""

import json
import random
from pathlib import Path

import pytest

from qlora_ray import init, plan
from qlora_ray.config import load_config
from qlora_ray.data.prepare import prepare
from qlora_ray.planning.early import exact_facts, refuse_before_ray
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import make_plan
from qlora_ray.planning.rows import layout
from qlora_ray.storage import open_folder
from tests.integration import door, many_runs, tiny_models

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "mixtral")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "stars", "while", "rain", "fell")
NUM_RECORDS = 60


def questions() -> list[tuple[str, str]]:
    chance = random.Random(0)
    say = [[" ".join(chance.choices(WORDS, k=chance.randint(2, 12))) for _ in range(NUM_RECORDS)] for _ in "qa"]
    return list(zip(*say, strict=True))


RECORDS = {
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_models.save(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    files = {name: folder / f"{name}.jsonl" for name in RECORDS}
    for name, path in files.items():
        path.write_text("\n".join(json.dumps(RECORDS[name](*one)) for one in questions()))
    return files


@pytest.fixture
def written(tmp_path, bases, data, capsys):
    """Runs init for a base and a shape of data; returns the file."""

    def write(family: str, shape: str, *more: str) -> Path:
        path = tmp_path / "my.yaml"
        arguments = ["--model", bases[family], "--data", str(data[shape]), "-o", str(path), *more]
        assert init.main(arguments) == 0, capsys.readouterr().err
        return path

    return write


@pytest.mark.parametrize("shape", RECORDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_file_is_read_and_planned_as_it_says(written, family, shape, tmp_path):
    path = written(family, shape)
    config = load_config(path)
    refuse_before_ray(config)
    assert plan.main(["-c", str(path)]) == 0
    facts = exact_facts(config)
    made = prepare(config, open_folder(str(tmp_path / "runs")), layout(config, facts))
    planned = make_plan(config, made.stats, facts, Hardware(1, 0), None)
    assert made.stats.formats == {shape: NUM_RECORDS} and made.stats.num_rejected == made.stats.num_truncated == 0
    assert made.stats.num_validation_samples == 6
    told = int(path.read_text().split("num_epochs:")[1].split("#")[1].split(" steps")[0])
    assert planned.num_steps == pytest.approx(told, rel=0.2)


@pytest.mark.parametrize(("family", "shape"), [("gpt2", "sharegpt")])  # all of them, and to the end: below
def test_file_trains(bases, data, family, shape, tmp_path, monkeypatch):
    """Named as one types them: from the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(bases[family])
    Path("mine.jsonl").symlink_to(data[shape])
    ended = door.run("--model", "base", "--data", "mine.jsonl", of="init")
    assert ended.returncode == 0 and ended.stderr == "", ended.stdout + ended.stderr
    asked = ("-c", "my.yaml", f"ray.storage_path={tmp_path}", "ray.run_name=mine", "training.max_steps=2")
    assert_done(door.run(*asked), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", RECORDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_file_trains_to_its_end(written, family, shape, tmp_path):
    asked = (f"ray.storage_path={tmp_path}", "ray.run_name=mine", "ray.num_workers=1")
    assert_done(many_runs.run("-c", str(written(family, shape)), *asked), tmp_path)


def assert_done(ended, storage: Path) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert door.summary(storage / "mine")["status"] == "done"
    assert (storage / "mine" / "adapter" / "adapter_model.safetensors").is_file()
