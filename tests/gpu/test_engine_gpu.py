"""The engine on a GPU: its state goes out and comes in, with the fused optimizer and the fused layers."""

import pytest
import torch

from qlora_ray.config import EMBEDDED_BASE
from tests.integration import tiny_models

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    import os

    import torch.distributed as dist

    if dist.is_initialized():
        pytest.skip("another process group is there; run this file by itself")
    os.environ["LOCAL_RANK"] = "0"
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("stage, dtype", [(3, "bfloat16"), (3, "float32"), (0, "bfloat16"), (2, "bfloat16")])
def test_state_taken_and_loaded_continues_the_training(stage, dtype, nccl):
    config = tiny_models.make_config(EMBEDDED_BASE)
    whole = tiny_models.build(config, stage, dtype, device="cuda")
    losses = tiny_models.train(whole, range(6), 1e-3, fixed=False)
    first = tiny_models.build(config, stage, dtype, device="cuda")
    begun = tiny_models.train(first, range(3), 1e-3, fixed=False)
    state = first.engine.state()
    assert state.optimizer_step == 3
    second = tiny_models.build(config, stage, dtype, weights=state.weights, device="cuda")
    second.engine.load_state(state)
    assert begun + tiny_models.train(second, range(3, 6), 1e-3, fixed=False) == pytest.approx(losses, rel=1e-4)
    for name, weight in whole.engine.weights().items():
        torch.testing.assert_close(second.engine.weights()[name], weight, rtol=1e-2, atol=1e-4)
