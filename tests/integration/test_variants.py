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
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats
from qlora_ray.worker.state import MOMENTS
from tests import fused_models
from tests.integration import engines, tiny_models

EMBEDDED = base_model_path("embedded")
CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "loftq"])
def test_variant_trains_and_its_adapter_reloads_in_plain_peft(variant, tmp_path, process_group):
    config = tiny_models.make_config(EMBEDDED, model={"lora_variant": variant}, deepspeed={"zero_stage": 3})
    engine = engines.build(config, tmp_path)
    losses = engines.train(engine, range(6), learning_rate=3e-3)
    assert losses[-1] < losses[0] - 0.05
    adapter = open_folder(str(tmp_path / "adapter"))
    write_adapter(adapter, engine.module, engine.weights(), AutoTokenizer.from_pretrained(EMBEDDED))
    plain = PeftModel.from_pretrained(load_base(config.model, config.quantization, "float32", CPU), adapter.path)
    # Fused layers add in another order than PEFT; a scale or a matrix that got lost is worth a thousand times this.
    assert tiny_models.difference(tiny_models.logits(engine.module), tiny_models.logits(plain)) < 1e-5


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
        assert left.norm() == pytest.approx(float(best), rel=1e-5)  # float32's rounding of the singular values
        assert left.norm() < error.norm()


def test_rslora_scales_by_the_root_of_the_rank():
    config = tiny_models.make_config(EMBEDDED, model={"lora_variant": "rslora", "lora_alpha": 4, "lora_r": 16})
    model = add_adapter(load_base(config.model, config.quantization, "float32", CPU), config.model, torch.float32, 0)
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)}
    assert scales == {4 / 16**0.5}


def test_loraplus_gives_b_matrices_the_higher_learning_rate(tmp_path, process_group):
    config = tiny_models.make_config(EMBEDDED, training={"loraplus_lr_ratio": 16})
    model = add_adapter(load_base(config.model, config.quantization, "float32", CPU), config.model, torch.float32, 0)
    parameters = trainable(model)
    groups = parameter_groups(parameters, config.training)
    assert [group["lr_ratio"] for group in groups] == [1.0, 16.0]
    assert set(groups[1]["names"]) == {name for name in parameters if "lora_B" in name}
    losses = engines.train(engines.build(config, tmp_path), range(6), learning_rate=1e-3)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    "stage, dtype, offload, variant",
    [
        (0, "float32", {}, "lora"),
        (1, "float32", {}, "lora"),
        (2, "float32", {}, "lora"),
        (3, "float32", {}, "lora"),
        (0, "bfloat16", {}, "lora"),
        (2, "bfloat16", {}, "lora"),
        (3, "bfloat16", {}, "lora"),
        (0, "float32", {}, "dora"),
        (3, "float32", {}, "dora"),
        (3, "float32", {"offload_optimizer": "cpu"}, "lora"),
        (3, "float32", {"offload_params": "cpu", "offload_optimizer": "cpu"}, "lora"),
    ],
)
def test_state_taken_and_loaded_continues_to_the_same_bits(stage, dtype, offload, variant, tmp_path, process_group):
    config = tiny_models.make_config(
        EMBEDDED, model={"lora_variant": variant}, deepspeed={"zero_stage": stage, **offload},
        quantization={"compute_dtype": dtype},
    )  # fmt: skip
    whole = engines.build(config, tmp_path / "whole")
    losses = engines.train(whole, range(4), 1e-3, fixed=False)

    first = engines.build(config, tmp_path / "first")
    begun = engines.train(first, range(2), 1e-3, fixed=False)
    state = first.state()
    assert state.optimizer_step == 2
    second = engines.build(config, tmp_path / "second", resumed=state)
    assert begun + engines.train(second, range(2, 4), 1e-3, fixed=False) == losses
    ours, theirs = second.state(), whole.state()
    for name in theirs.weights:
        assert torch.equal(ours.weights[name], theirs.weights[name]), name
        for key, value in theirs.moments[name].items():
            assert torch.equal(ours.moments[name][key], value), (name, key)


@pytest.mark.parametrize("stage, dtype", [(0, "float32"), (2, "float32"), (3, "float32"), (3, "bfloat16")])
def test_gradient_that_is_not_finite_changes_neither_weights_nor_moments(stage, dtype, tmp_path, process_group):
    config = tiny_models.make_config(EMBEDDED, deepspeed={"zero_stage": stage}, quantization={"compute_dtype": dtype})
    hurt, whole = engines.build(config, tmp_path / "hurt"), engines.build(config, tmp_path / "whole")
    for engine in (hurt, whole):
        engines.train(engine, range(2), 1e-3, fixed=False)
    hurt.backward(sum_of_nats(hurt, tiny_models.batch(99)) * float("nan"))
    hurt.add_up(1)
    assert hurt.step(1e-3) is False and hurt.grad_norm() is None
    losses = [engines.train(engine, range(2, 4), 1e-3, fixed=False) for engine in (hurt, whole)]
    assert losses[0] == losses[1]
    ours, theirs = hurt.state(), whole.state()
    assert ours.optimizer_step == theirs.optimizer_step == 4
    assert all(torch.equal(ours.weights[name], weight) for name, weight in theirs.weights.items())


def exact_nats_and_gradients(peft, weights) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the mean over a batch's tokens, at these weights, with the gradient clipped to a norm of 1."""
    for name, parameter in trainable(peft).items():
        parameter.data.copy_(weights[name])
    nats, gradients = fused_models.nats_and_gradients(peft, tiny_models.batch())
    count = int(num_label_tokens(tiny_models.batch()))
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm() / count
    return nats / count, {name: gradient / count / norm.clamp(min=1) for name, gradient in gradients.items()}


@pytest.mark.bites("worker.deepspeed_patches.optimizer.ALL_MOMENTS")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_each_step_is_adamws_with_pefts_float64_gradient_at_the_same_weights(stage, tmp_path, process_group):
    """Trajectories say less: where a gradient is next to 0, AdamW makes a whole step of its rounding."""
    config = tiny_models.make_config(EMBEDDED, training={"loraplus_lr_ratio": 4}, deepspeed={"zero_stage": stage})
    engine, peft = engines.build(config, tmp_path), fused_models.build_reference(EMBEDDED)
    weights, rate, (beta1, beta2) = engine.weights(), 1e-3, (0.9, 0.999)
    moments = {name: dict.fromkeys(MOMENTS, 0 * weight) for name, weight in weights.items()}
    for step in range(1, 5):
        loss, gradients = exact_nats_and_gradients(peft, weights)
        assert engines.train(engine, [step], rate) == [pytest.approx(loss, rel=1e-6)]
        after = engine.state()
        for name, gradient in gradients.items():
            first, second = (after.moments[name][key].double() for key in MOMENTS)
            # float32 is good to about 1e-6 of a gradient; one that lacks a token, or a scale, differs by 1e-2 and more.
            wanted = torch.lerp(gradient, moments[name]["exp_avg"].double(), beta1)
            assert (first - wanted).norm() <= 1e-5 * wanted.norm(), name
            wanted = torch.lerp(gradient**2, moments[name]["exp_avg_sq"].double(), beta2)
            assert (second - wanted).norm() <= 2e-5 * wanted.norm(), name
            # From moments to weights there is no rounding but that of a few float32 operations.
            lr = rate * (4 if "lora_B" in name else 1)
            change = lr * first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + 1e-8)
            stepped = weights[name] - change
            torch.testing.assert_close(after.weights[name].double(), stepped, rtol=2e-7, atol=1e-6 * lr, msg=name)
        weights, moments = after.weights, after.moments


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


@pytest.mark.parametrize("family", ["embedded", "opt"])  # fused layers, and fused projections in PEFT's own layers
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputation_changes_no_bit_of_the_training(family, dropout, tmp_path, process_group):
    states, base = {}, EMBEDDED if family == "embedded" else tiny_models.save(family, tmp_path / family)
    for recompute in ("none", "all"):
        config = tiny_models.make_config(
            base, model={"lora_dropout": dropout}, training={"recompute": recompute}, deepspeed={"zero_stage": 3}
        )
        engine = engines.build(config, tmp_path / recompute)
        assert engine.module.is_gradient_checkpointing == (recompute == "all" and family == "opt")
        states[recompute] = engines.train(engine, range(4), 3e-3), engine.weights()
    (losses, weights), (again, others) = states["none"], states["all"]
    assert losses == again
    assert all(torch.equal(weights[name], others[name]) for name in weights)
