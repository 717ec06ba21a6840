"""What a run may be resumed with is what it was begun with."""

import dataclasses
import json

import pytest

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.rundir.directory import check_resumable, run_identity
from qlora_ray.storage import open_folder
from tests.unit.test_plan import DATA, FACTS, plan


def identity(order: str) -> dict:
    return run_identity(Config.model_validate({"data": {"order": order}}), DATA, FACTS, plan())


def test_run_cannot_be_resumed_in_another_order(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"identity": identity("given")}))
    assert check_resumable(open_folder(str(tmp_path)), identity("given"), resume=True)
    with pytest.raises(ConfigError, match=r"begun with another order: data.order=shuffled \(before: given\)"):
        check_resumable(open_folder(str(tmp_path)), identity("shuffled"), resume=True)


def test_run_begun_before_the_order_could_be_asked_goes_on_shuffled(tmp_path):
    before = {name: value for name, value in identity("shuffled").items() if name != "order"}
    (tmp_path / "manifest.json").write_text(json.dumps({"identity": before}))
    assert check_resumable(open_folder(str(tmp_path)), identity("shuffled"), resume=True)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"lora_r": 4}}, "another lora: model.lora_r=4 (before: 16)."),
        ({"model": {"rank_pattern": {"q_proj": 4}}}, "another lora: model.rank_pattern={'q_proj': 4} (before: None)."),
        (
            {"model": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
            "another base: model.rope_scaling={'rope",
        ),
        ({"quantization": {"type": "fp4"}}, "another quantization: quantization.type=fp4 (before: nf4)."),
        ({"training": {"seed": 7}}, "another seed: training.seed=7 (before: 0)."),
        ({"training": {"batch_size": 2}}, "another batch: training.batch_size=2 (before: 4)."),
    ],
)
def test_what_must_not_change_is_refused_by_the_key_that_decides_it(tmp_path, sections, said):
    (tmp_path / "manifest.json").write_text(json.dumps({"identity": identity("shuffled")}))
    config = Config.model_validate(sections)
    now = run_identity(config, DATA, FACTS, plan(**sections))
    with pytest.raises(ConfigError) as refused:
        check_resumable(open_folder(str(tmp_path)), now, resume=True)
    assert said in str(refused.value)


def test_other_records_are_refused_by_what_decides_rows(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"identity": identity("shuffled")}))
    more = dataclasses.replace(DATA, fingerprint="other")
    with pytest.raises(ConfigError, match=r"data.train_file, or .* \(before: rows key, now other\)"):
        check_resumable(open_folder(str(tmp_path)), run_identity(Config(), more, FACTS, plan()), resume=True)
