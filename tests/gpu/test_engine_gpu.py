"""The engine on a GPU: its state goes out and comes in, with the fused optimizer and the fused layers."""

import pytest
import torch

from qlora_ray.config import EMBEDDED_BASE
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats
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


@pytest.mark.parametrize("stage, dtype", [(3, "bfloat16"), (3, "float32"), (0, "bfloat16")])
def test_step_whose_gradient_is_not_finite_changes_nothing(stage, dtype, nccl):
    sharded = tiny_models.build(tiny_models.make_config(EMBEDDED_BASE), stage, dtype, device="cuda")
    tiny_models.train(sharded, range(2), 1e-3)
    before = sharded.engine.state()
    rows = {name: values.to("cuda") for name, values in tiny_models.batch().items()}
    sharded.engine.backward(sum_of_nats(sharded.engine, rows) * float("inf"))
    sharded.engine.add_up(1)
    assert sharded.engine.step(1e-3) is False and sharded.engine.grad_norm() is None
    after = sharded.engine.state()
    assert after.optimizer_step == before.optimizer_step == 2
    for name, weight in before.weights.items():
        assert torch.equal(after.weights[name], weight)
        assert all(torch.equal(after.moments[name][key], before.moments[name][key]) for key in before.moments[name])
    assert all(loss == loss for loss in tiny_models.train(sharded, range(2, 4), 1e-3))


@pytest.mark.bites("worker.deepspeed_patches.NAMED_STREAM")
def test_deepspeed_asks_torch_for_the_stream_of_a_named_device(nccl, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    sharded = tiny_models.build(tiny_models.make_config(EMBEDDED_BASE), 3, "bfloat16", device="cuda")
    through, plain = [], get_accelerator().current_stream
    monkeypatch.setattr(get_accelerator(), "current_stream", lambda *some: through.append(some) or plain(*some))
    tiny_models.train(sharded, range(1), 1e-3)
    assert through  # DeepSpeed asks there
    named, of_torch = [], torch.cuda.current_stream
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: named.append(device) or of_torch(device))
    plain()
    assert named == [torch.cuda.current_device()]


@pytest.mark.bites("worker.engine.FOUND_INF")
def test_a_step_waits_for_the_gpu_once_and_after_it_is_launched(nccl, recwarn):
    sharded = tiny_models.build(tiny_models.make_config(EMBEDDED_BASE), 3, "bfloat16", device="cuda")
    tiny_models.train(sharded, range(2), 1e-3)
    rows = {name: values.to("cuda") for name, values in tiny_models.batch().items()}
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        sharded.engine.backward(sum_of_nats(sharded.engine, rows) / num_label_tokens(rows))
        sharded.engine.add_up(1)
        assert sharded.engine.step(1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno} {w.message}" for w in recwarn if "called a synch" in str(w.message)]
    assert len(waits) == 1 and "torch/cuda/streams.py" in waits[0], waits  # for whether the gradient is finite
