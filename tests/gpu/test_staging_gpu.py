"""Values of files arrive on a GPU as they are stored, however many buffers they pass through."""

import pytest
import torch
from safetensors.torch import save_file

from qlora_ray.model import staging
from qlora_ray.model.pieces import lazily
from qlora_ray.model.staging import Staging
from qlora_ray.model.tensors import TensorFiles

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("block", [256, 1000])
def test_values_arrive_as_they_are_stored(block, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "BUFFER", 4096)
    monkeypatch.setattr(staging, "BLOCK", block)
    stored = {"a": torch.randn(70, 90), "b": torch.randn(70, 90), "c": torch.randn(7, 9).bfloat16()}
    save_file(stored, tmp_path / "all.safetensors")
    values = lazily(TensorFiles([tmp_path / "all.safetensors"], "key"), "key")
    way = Staging(torch.device("cuda"))
    joined = torch.cat([values["a"], values["b"]], 1)  # by turns: a row of each
    wanted = torch.cat([stored["a"], stored["b"]], 1).view(-1)
    found = [way.cut(joined, 0, joined.numel()), way.cut(joined, 333, 9999), way.cut(values["c"], 1, 63)]
    way.finish()
    for one, other in zip(found, [wanted, wanted[333:9999], stored["c"].view(-1)[1:]], strict=True):
        assert torch.equal(one.cpu(), other)
