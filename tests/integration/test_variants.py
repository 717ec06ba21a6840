"""LoRA variants and ZeRO stages: each trains, exports, and gives its state back to the bit."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from transformers import AutoTokenizer

from qlora_ray.config import base_model_path
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import load_base
from qlora_ray.storage import open_folder
from qlora_ray.worker.engine import parameter_groups
from qlora_ray.worker.export import write_adapter
from qlora_ray.worker.loss import sum_of_nats
from tests.integration import tiny_models

EMBEDDED = base_model_path("embedded")
CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "loftq"])
def test_variant_trains_and_its_adapter_reloads_in_plain_peft(variant, tmp_path, process_group):
    config = tiny_models.make_config(EMBEDDED, model={"lora_variant": variant})
    sharded = tiny_models.build(config, stage=2 if variant == "dora" else 3)
    losses = tiny_models.train(sharded, range(6), learning_rate=3e-3)
    assert losses[-1] < losses[0] - 0.05
    adapter = open_folder(str(tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    write_adapter(adapter, sharded.engine.module, sharded.engine.weights(), tokenizer)
    plain = PeftModel.from_pretrained(load_base(config.model, config.quantization, "float32", CPU), adapter.path)
    torch.testing.assert_close(
        tiny_models.logits(plain), tiny_models.logits(sharded.engine.module), rtol=1e-4, atol=1e-4
    )


def test_loftq_starts_with_the_best_rank_r_approximation_of_the_quantization_error():
    config = tiny_models.make_config(EMBEDDED, model={"lora_variant": "loftq", "lora_alpha": 4})
    start = add_adapter(load_base(config.model, config.quantization, "float32", CPU), config.model, torch.float32, 0)
    unquantized = load_base(config.model, config.quantization.model_copy(update={"type": "none"}), "float32", CPU)
    exact = dict(unquantized.named_parameters())
    layers = [(n, m) for n, m in start.named_modules() if hasattr(m, "lora_A")]
    assert len(layers) == 28
    for name, layer in layers:
        packed = layer.get_base_layer().weight
        error = exact[name.removeprefix("base_model.model.") + ".weight"] - dequantize_4bit(
            packed.data, packed.quant_state
        )
        left = error - layer.get_delta_weight("default").detach()
        best = torch.linalg.svdvals(error)[config.model.lora_r :].norm()  # Eckart-Young
        assert left.norm() == pytest.approx(float(best), rel=1e-3)
        assert left.norm() < error.norm()


def test_rslora_scales_by_the_root_of_the_rank():
    config = tiny_models.make_config(EMBEDDED, model={"lora_variant": "rslora", "lora_alpha": 4, "lora_r": 16})
    model = add_adapter(load_base(config.model, config.quantization, "float32", CPU), config.model, torch.float32, 0)
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)}
    assert scales == {4 / 16**0.5}


def test_loraplus_gives_b_matrices_the_higher_learning_rate(process_group):
    config = tiny_models.make_config(EMBEDDED, training={"loraplus_lr_ratio": 16})
    model = add_adapter(load_base(config.model, config.quantization, "float32", CPU), config.model, torch.float32, 0)
    parameters = trainable(model)
    groups = parameter_groups(parameters, config.training)
    assert [group["lr_ratio"] for group in groups] == [1.0, 16.0]
    assert set(groups[1]["names"]) == {name for name in parameters if "lora_B" in name}
    losses = tiny_models.train(tiny_models.build(config), range(6), learning_rate=1e-3)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    "stage, dtype, zero",
    [
        (0, "float32", {}),
        (1, "float32", {}),
        (2, "float32", {}),
        (3, "float32", {}),
        (0, "bfloat16", {}),
        (2, "bfloat16", {}),
        (3, "bfloat16", {}),
        (3, "float32", {"offload_optimizer": {"device": "cpu"}}),
        (3, "float32", {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_state_taken_and_loaded_continues_to_the_same_bits(stage, dtype, zero, process_group):
    config = tiny_models.make_config(EMBEDDED)
    whole = tiny_models.build(config, stage, dtype, **zero)
    losses = tiny_models.train(whole, range(6), 1e-3, fixed=False)

    first = tiny_models.build(config, stage, dtype, **zero)
    begun = tiny_models.train(first, range(3), 1e-3, fixed=False)
    state = first.engine.state()
    assert state.optimizer_step == 3
    second = tiny_models.build(config, stage, dtype, weights=state.weights, **zero)
    second.engine.load_state(state)
    assert begun + tiny_models.train(second, range(3, 6), 1e-3, fixed=False) == losses
    ours, theirs = second.engine.state(), whole.engine.state()
    for name in theirs.weights:
        assert torch.equal(ours.weights[name], theirs.weights[name]), name
        for key, value in theirs.moments[name].items():
            assert torch.equal(ours.moments[name][key], value), (name, key)


@pytest.mark.parametrize("stage, dtype", [(0, "float32"), (2, "float32"), (3, "float32"), (3, "bfloat16")])
def test_gradient_that_is_not_finite_changes_neither_weights_nor_moments(stage, dtype, process_group):
    config = tiny_models.make_config(EMBEDDED)
    hurt, whole = tiny_models.build(config, stage, dtype), tiny_models.build(config, stage, dtype)
    for sharded in (hurt, whole):
        tiny_models.train(sharded, range(2), 1e-3, fixed=False)
    rows = tiny_models.batch(99)
    hurt.engine.backward(sum_of_nats(hurt.engine, rows) * float("nan"))
    hurt.engine.add_up(1)
    assert hurt.engine.step(1e-3) is False and hurt.engine.grad_norm() is None
    assert tiny_models.train(hurt, range(2, 4), 1e-3, fixed=False) == tiny_models.train(
        whole, range(2, 4), 1e-3, fixed=False
    )
    ours, theirs = hurt.engine.state(), whole.engine.state()
    assert ours.optimizer_step == theirs.optimizer_step == 4
    assert all(torch.equal(ours.weights[name], weight) for name, weight in theirs.weights.items())


def test_fused_training_gives_the_losses_and_the_state_of_pefts_own_path(process_group):
    config = tiny_models.make_config(EMBEDDED, training={"loraplus_lr_ratio": 4})
    fused, plain = tiny_models.build(config), tiny_models.build(config, fused=False)
    assert tiny_models.train(fused, range(5), 1e-3) == pytest.approx(tiny_models.train(plain, range(5), 1e-3), rel=1e-5)
    ours, theirs = fused.engine.state(), plain.engine.state()
    assert list(ours.weights) == list(theirs.weights)
    for name, weight in theirs.weights.items():
        # Single values may differ: where a gradient is next to 0, AdamW makes a step of its rounding.
        assert (ours.weights[name] - weight).norm() < 1e-3 * weight.norm(), name
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-3, atol=4e-4)  # B takes steps of 4e-3
        assert ours.moments[name]["exp_avg"].shape == weight.shape


def test_gradient_after_an_evaluation_is_the_gradient_before_it():
    config = tiny_models.make_config(EMBEDDED)
    model = add_adapter(load_base(config.model, config.quantization, "float32", CPU), config.model, torch.float32, 0)

    def gradients():
        model.train()
        model.zero_grad()
        out = model(**tiny_models.batch(), use_cache=False)
        out.loss.backward()
        return {name: p.grad.clone() for name, p in trainable(model).items()}

    before = gradients()
    tiny_models.logits(model)
    after = gradients()
    assert any(gradient.abs().sum() > 0 for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_recomputation_does_not_change_the_training(process_group):
    losses = {}
    for recompute in (False, True):
        sharded = tiny_models.build(tiny_models.make_config(EMBEDDED), fused=False)
        if recompute:
            sharded.model.gradient_checkpointing_enable({"use_reentrant": True})
            sharded.model.enable_input_require_grads()
        losses[recompute] = tiny_models.train(sharded, range(4), 3e-3)
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
