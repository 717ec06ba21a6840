"""The engine on a GPU: its state goes out and comes in, with the fused optimizer and the fused layers."""

import pytest
import torch

from qlora_ray.config import EMBEDDED_BASE, Config
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats
from tests.integration import engines, tiny_models

pytestmark = pytest.mark.gpu


def settings(stage: int, dtype: str) -> Config:
    return tiny_models.make_config(
        EMBEDDED_BASE, deepspeed={"zero_stage": stage}, quantization={"compute_dtype": dtype}
    )


@pytest.mark.parametrize("stage, dtype", [(3, "bfloat16"), (3, "float32"), (0, "bfloat16"), (2, "bfloat16")])
def test_state_taken_and_loaded_continues_to_the_same_bits(stage, dtype, nccl, adding_in_one_order, tmp_path):
    config = settings(stage, dtype)
    whole = engines.build(config, tmp_path / "whole", device="cuda")
    losses = engines.train(whole, range(6), 1e-3, fixed=False)
    first = engines.build(config, tmp_path / "first", device="cuda")
    begun = engines.train(first, range(3), 1e-3, fixed=False)
    state = first.state()
    assert state.optimizer_step == 3
    second = engines.build(config, tmp_path / "second", resumed=state, device="cuda")
    assert begun + engines.train(second, range(3, 6), 1e-3, fixed=False) == losses
    ours = second.weights()
    assert all(torch.equal(ours[name], weight) for name, weight in whole.weights().items())


@pytest.mark.parametrize("stage, dtype", [(3, "bfloat16"), (3, "float32"), (0, "bfloat16")])
def test_step_whose_gradient_is_not_finite_changes_nothing(stage, dtype, nccl, tmp_path):
    engine = engines.build(settings(stage, dtype), tmp_path, device="cuda")
    engines.train(engine, range(2), 1e-3)
    before = engine.state()
    rows = {name: values.to("cuda") for name, values in tiny_models.batch().items()}
    engine.backward(sum_of_nats(engine, rows) * float("inf"))
    engine.add_up(1)
    assert engine.step(1e-3) is False and engine.grad_norm() is None
    after = engine.state()
    assert after.optimizer_step == before.optimizer_step == 2
    for name, weight in before.weights.items():
        assert torch.equal(after.weights[name], weight)
        assert all(torch.equal(after.moments[name][key], before.moments[name][key]) for key in before.moments[name])
    assert all(loss == loss for loss in engines.train(engine, range(2, 4), 1e-3))


@pytest.mark.bites("worker.deepspeed_patches.hooks.NAMED_STREAM")
def test_deepspeed_asks_torch_for_the_stream_of_a_named_device(nccl, monkeypatch, tmp_path):
    from deepspeed.accelerator import get_accelerator

    config = settings(3, "bfloat16")  # of workers that share the base: else there is nothing to gather
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"num_workers": 2})})
    engine = engines.build(config, tmp_path, device="cuda")
    through, plain = [], get_accelerator().current_stream
    monkeypatch.setattr(get_accelerator(), "current_stream", lambda *some: through.append(some) or plain(*some))
    engines.train(engine, range(1), 1e-3)
    assert through  # DeepSpeed asks there
    named, of_torch = [], torch.cuda.current_stream
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: named.append(device) or of_torch(device))
    plain()
    assert named == [torch.cuda.current_device()]


@pytest.mark.bites("worker.engine.FOUND_INF")
def test_a_step_waits_for_the_gpu_once_and_after_it_is_launched(nccl, recwarn, tmp_path):
    engine = engines.build(settings(3, "bfloat16"), tmp_path, device="cuda")
    engines.train(engine, range(4), 1e-3)  # after the guard's forward pass ZeRO-3 needs three to know their order
    rows = {name: values.to("cuda") for name, values in tiny_models.batch().items()}
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        engine.backward(sum_of_nats(engine, rows) / num_label_tokens(rows))
        engine.add_up(1)
        assert engine.step(1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno} {w.message}" for w in recwarn if "called a synch" in str(w.message)]
    assert len(waits) == 1 and "torch/cuda/streams.py" in waits[0], waits  # for whether the gradient is finite
