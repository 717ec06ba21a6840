"""A process group of one GPU, for tests that need DeepSpeed but not Ray; kernels that add in one order."""

import os

import pytest
import torch

from qlora_ray.config import Config
from qlora_ray.worker import setup


@pytest.fixture(scope="session")
def nccl(tmp_path_factory):
    import torch.distributed as dist

    if dist.is_initialized():
        pytest.skip("another process group is there; run the tests of GPUs by themselves")
    os.environ["LOCAL_RANK"] = "0"
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def adding_in_one_order():
    """What training.deterministic asks for, for one test."""
    setup.choose_kernels(Config.model_validate({"training": {"deterministic": True}}), torch.device("cuda"))
    yield
    torch.use_deterministic_algorithms(False)
