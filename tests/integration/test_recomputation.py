"""Layers that are not fused: whatever each keeps for backward, the same bits; and what they keep is measured."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from qlora_ray.config import Config
from qlora_ray.model.adapter import add_adapter
from qlora_ray.model.apart import Apart
from qlora_ray.model.base import load_base
from qlora_ray.model.load import load_shares
from qlora_ray.model.plain import keep_plain, measure_whole_bytes, plain_layers
from qlora_ray.model.recompute import Keep
from qlora_ray.worker import deepspeed_patches as patches
from qlora_ray.worker import recomputation
from qlora_ray.worker.base import share_out
from tests import fused_models
from tests.integration import engines, tiny_models

FAMILIES = ("gpt_neox", "opt", "falcon", "gemma2", "olmoe")
OWN_DROPOUT = {  # of the base itself, drawn from torch's generator
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1}, "opt": {"dropout": 0.1, "attention_dropout": 0.1},
    "falcon": {"hidden_dropout": 0.1}, "gemma2": {"attention_dropout": 0.1}, "olmoe": {"attention_dropout": 0.1},
}  # fmt: skip
CHOICES = [(Keep.ALL, Keep.ALL), (Keep.INPUT, Keep.ALL), (Keep.ALL, Keep.INPUT), (Keep.HOST, Keep.HOST)]


class Shelf:
    """A stash on a CPU: what HostStash is beside a GPU."""

    def __init__(self):
        self.order: list[tuple[str, int]] = []
        self._parked: dict[int, torch.Tensor] = {}

    def put(self, slot: int, x: torch.Tensor) -> None:
        self.order.append(("put", slot))
        self._parked[slot] = x.detach().clone()

    def take(self, slot: int) -> torch.Tensor:
        self.order.append(("take", slot))
        return self._parked.pop(slot)


def trained(config: Config, folder, levels: tuple[Keep, ...], shelf: Shelf | None = None):
    """Losses and weights of three steps with a choice for each layer."""
    engine = engines.build(config, folder)
    layers = plain_layers(engine.module)
    assert len(layers) == 2
    keep_plain(layers, levels, shelf)  # type: ignore[arg-type]
    return engines.train(engine, range(3), 3e-3, fixed=False), engine.weights()


@pytest.mark.bites("model.plain.LAYER_CHECKPOINTS")
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_layer_keeps_changes_no_bit(family, stage, tmp_path, process_group):
    base = tiny_models.save(family, tmp_path / "base", **OWN_DROPOUT[family])
    dropout = {"lora_dropout": 0.1} if family != "olmoe" else {}  # PEFT has none for experts
    config = tiny_models.make_config(
        base, model=dropout, training={"recompute": "all"}, deepspeed={"zero_stage": stage}
    )
    losses, weights = trained(config, tmp_path / "0", CHOICES[0])
    for number, levels in enumerate(CHOICES[1:], 1):
        again, others = trained(config, tmp_path / str(number), levels)
        assert again == losses
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("family", ["opt", "falcon"])
def test_inputs_of_layers_wait_elsewhere_and_come_back_in_the_reverse_order(family, tmp_path, process_group):
    base = tiny_models.save(family, tmp_path / "base", **OWN_DROPOUT[family])
    config = tiny_models.make_config(base, training={"recompute": "all"})
    whole, shelf = trained(config, tmp_path / "whole", CHOICES[0]), Shelf()
    losses, weights = trained(config, tmp_path / "parked", (Keep.HOST, Keep.HOST), shelf)
    assert losses == whole[0] and all(torch.equal(weights[name], value) for name, value in whole[1].items())
    assert shelf.order == [("put", 0), ("put", 1), ("take", 1), ("take", 0)] * 3


def saved_bytes(model, batch, levels) -> int:
    """Bytes that autograd keeps of all layers in a real forward pass."""
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    keep_plain(plain_layers(model), levels, None)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.get_base_model().base_model(input_ids=batch["input_ids"], use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(size for address, size in saved.items() if address not in weights)


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "falcon", "gemma2"])
def test_bytes_that_a_layer_keeps_are_measured(family, tmp_path):
    model = fused_models.build(tiny_models.save(family, tmp_path), torch.bfloat16)
    model.enable_input_require_grads()
    batch = tiny_models.batch()
    measured = measure_whole_bytes(model, batch["input_ids"], patches.gathered)
    assert not model.is_gradient_checkpointing
    whole, again = (saved_bytes(model, batch, levels) for levels in ((Keep.ALL,) * 2, (Keep.INPUT, Keep.ALL)))
    tokens, width = batch["input_ids"].numel(), 64 * 2
    # A layer that computes again keeps its input, which it would keep as a whole too.
    assert measured == pytest.approx((whole - again) / tokens + width, abs=8)


def test_layers_that_are_not_fused_keep_what_fits_as_measured(tmp_path, process_group, monkeypatch):
    config = tiny_models.make_config(tiny_models.save("opt", tmp_path / "base"))
    rows = engines.rows_of_batch(tmp_path / "cache")
    plan = engines.plan_of(config, rows, "cuda")
    assert plan.recompute == "auto" and not hasattr(plan.layer_shape, "inner")
    model = fused_models.build(config.model.base_model, torch.bfloat16)
    measured = recomputation.prepare(model, plan, torch.device("cpu"))
    whole = measured.layer_shape.kept_bytes(Keep.ALL)
    assert whole != plan.layer_shape.kept_bytes(Keep.ALL) and whole == measure_whole_bytes(
        model, torch.arange(24)[None], patches.gathered
    )
    for room, kept in ((0.0, {Keep.HOST}), (1e9, {Keep.ALL})):
        monkeypatch.setattr(recomputation, "_room_for_activations", lambda *_, room=room: room)
        choice = recomputation.keep_what_fits(model, config, measured, torch.device("cpu"))
        assert set(choice.levels) == kept
        assert [layer.gradient_checkpointing for layer in plain_layers(model)] == [kept != {Keep.ALL}] * 2


def test_a_base_that_is_held_in_shares_is_measured_as_a_whole_one(tmp_path, process_group):
    config = tiny_models.make_config(tiny_models.save("opt", tmp_path / "base"))
    plan, cpu = engines.plan_of(config, engines.rows_of_batch(tmp_path / "cache")), torch.device("cpu")
    whole = load_base(config.model, config.quantization, "float32", cpu)
    apart = Apart(cpu)
    shared, _ = load_shares(config.model, config.quantization, "float32", cpu, apart)
    assert share_out(shared, apart, plan) is None
    assert all(parameter.numel() == 0 for parameter in shared.parameters())
    ids = torch.arange(24)[None]
    one, other = (
        measure_whole_bytes(add_adapter(base, config.model, torch.float32, 0), ids, patches.gathered)
        for base in (whole, shared)
    )
    assert one == other > 0
    assert all(parameter.numel() == 0 for parameter in shared.parameters() if not parameter.requires_grad)


def test_recompute_auto_on_a_gpu_is_for_every_family(tmp_path):
    for family in ("gpt2", "llama"):
        config = tiny_models.make_config(tiny_models.save(family, tmp_path / family))
        assert engines.plan_of(config, engines.rows_of_batch(tmp_path / f"{family}_rows"), "cuda").recompute == "auto"
