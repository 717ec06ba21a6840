"""A process group of one, for tests that need DeepSpeed but not Ray; a small trained adapter."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def process_group(tmp_path_factory):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; Ray Train sets it on workers
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An adapter of the embedded base, in a run directory. Not to be changed."""
    from qlora_ray.config import base_model_path
    from tests.integration import adapters

    return adapters.trained(tmp_path_factory.mktemp("use") / "run", base_model_path("embedded"), steps=6)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(trained, tmp_path / "adapter")


@pytest.fixture
def refused(capsys):
    """Opens a door that must refuse; returns its message."""

    def open_door(door, *arguments) -> str:
        capsys.readouterr()
        assert door.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert all(line.startswith("qlora_ray ") for line in out.splitlines() if line), out  # what it is about to do
        assert err.startswith("error: ") and len(err.splitlines()) == 1, err
        return err

    return open_door


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts folders into a hub's cache of their own; returns the function."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str, folder: Path | str) -> Path:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, home / "snapshots" / ("a" * 40))
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("a" * 40)
        return home / "snapshots" / ("a" * 40)

    return put


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A hub's cache of assets of its own; returns the folder in it where converted weights go."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "qlora_ray" / "safetensors"
