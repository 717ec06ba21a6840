"""The first-step guard: 4-bit weights that ZeRO would silently cast stop the run."""

import dataclasses

import pytest
import torch

from qlora_ray.config import base_model_path
from qlora_ray.data.stats import DataStats
from qlora_ray.model import base as base_module
from qlora_ray.model.facts import read_facts
from qlora_ray.planning.plan import Hardware, Plan, make_plan
from qlora_ray.worker import setup
from qlora_ray.worker.errors import GuardError
from tests.integration import tiny_models


def _plan(config, num_gpus=0) -> Plan:
    stats = DataStats(**{f.name: "x" if f.type in ("str", str) else 8 for f in dataclasses.fields(DataStats)})
    return make_plan(config, stats, read_facts(config.model.base_model), Hardware(num_cpus=1, num_gpus=num_gpus), None)


def _guarded(monkeypatch, storage_dtype) -> tuple[float, float, Plan]:
    exact = base_module.four_bit_config

    def with_storage(quantization, dtype):
        settings = exact(quantization, dtype)
        settings.bnb_4bit_quant_storage = storage_dtype
        return settings

    monkeypatch.setattr(base_module, "four_bit_config", with_storage)
    path = base_model_path("embedded")
    config = tiny_models.make_config(path)
    plan = dataclasses.replace(_plan(config), compute_dtype="bfloat16")
    built = base_module.load_base(config.model, config.quantization, "bfloat16", torch.device("cpu"))
    model = tiny_models.add_adapter(built, config.model, torch.bfloat16, 0)
    before = setup._loss(model, tiny_models.batch())
    engine = tiny_models.Engine(model, config.training, tiny_models.deepspeed_config(3, "bfloat16"))
    return before, setup._loss(engine.module, tiny_models.batch()), plan


def test_guard_passes_byte_storage(monkeypatch, process_group):
    before, after, plan = _guarded(monkeypatch, torch.uint8)
    setup.check_same_loss(before, after, plan)


def test_guard_stops_a_run_whose_packed_weights_were_cast(monkeypatch, process_group):
    before, after, plan = _guarded(monkeypatch, torch.float16)
    with pytest.raises(GuardError, match="bnb_4bit_quant_storage"):
        setup.check_same_loss(before, after, plan)


@pytest.mark.bites("worker.setup.NOISE")
def test_neftune_noise_is_there_in_training_only(process_group):
    model = tiny_models.build(tiny_models.make_config(base_model_path("embedded"))).model
    rows = tiny_models.batch()

    def loss(training):
        model.train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            return float(model(**rows, use_cache=False).loss)

    quiet = loss(True)
    setup._add_noise_to_embeddings(model, 5.0)
    assert loss(True) != quiet
    assert loss(False) == pytest.approx(quiet, rel=1e-6)


@pytest.mark.parametrize("recompute, first", [("none", "training.recompute=all"), ("auto", "a lower training.memory")])
def test_out_of_memory_names_what_helps_in_order_with_what_each_would_save(recompute, first):
    config = tiny_models.make_config(base_model_path("embedded"), training={"batch_size": 4, "max_length": 64})
    plan = dataclasses.replace(_plan(config), recompute=recompute, zero_stage=3)
    said = setup.out_of_memory_message(config, plan, 1, torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    assert said.startswith(f"worker 1 is out of memory (CUDA out of memory.). What helps, in order: {first}")
    keys = ["training.batch_size=2 (about ", "training.max_length=32 (about ", "deepspeed.offload_params=cpu (about "]
    assert sorted(keys, key=said.index) == keys and "more" not in said
