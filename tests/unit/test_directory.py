"""What a run may be resumed with is what it was begun with."""

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
    with pytest.raises(ConfigError, match="begun with another order: given, now shuffled"):
        check_resumable(open_folder(str(tmp_path)), identity("shuffled"), resume=True)


def test_run_begun_before_the_order_could_be_asked_goes_on_shuffled(tmp_path):
    before = {name: value for name, value in identity("shuffled").items() if name != "order"}
    (tmp_path / "manifest.json").write_text(json.dumps({"identity": before}))
    assert check_resumable(open_folder(str(tmp_path)), identity("shuffled"), resume=True)
