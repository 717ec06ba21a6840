"""Weights that pass through slots of a GPU, copied on a stream of their own, give the bits of weights that stay."""

import pytest
import torch

from qlora_ray.config import Config
from qlora_ray.model.ring import Ring
from qlora_ray.worker import setup
from tests.integration import engines, ranks, tiny_models

pytestmark = pytest.mark.gpu


@pytest.fixture
def adding_in_one_order():
    setup.choose_kernels(Config.model_validate({"training": {"deterministic": True}}), torch.device("cuda"))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("num_resident", [0, 3])
def test_ring_on_and_off_give_one_adapter(family, num_resident, tmp_path, nccl, adding_in_one_order, monkeypatch):
    base = tiny_models.save(
        family, tmp_path / "base", num_hidden_layers=8, hidden_size=512, intermediate_size=1024, head_dim=128
    )
    plain = Ring.keep_last
    monkeypatch.setattr(Ring, "keep_last", lambda self, _: plain(self, num_resident))  # else all stay: they fit
    left = {}
    for offload in ("none", "cpu", "nvme"):
        path = {"nvme_path": str(tmp_path)} if offload == "nvme" else {}
        config = tiny_models.make_config(
            base, deepspeed={"offload_params": offload, **path}, training={"recompute": "all", "deterministic": True}
        )
        engine = engines.build(config, tmp_path / offload, device="cuda")
        losses = engines.train(engine, range(6), fixed=False)
        left[offload] = losses, ranks.digest(*engine.state().weights.values())
    assert left["cpu"] == left["none"] and left["nvme"] == left["none"]
