"""A process group of one, for tests that need DeepSpeed but not Ray."""

import os

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
