"""The first-step guard: 4-bit weights that ZeRO would silently cast stop the run."""

import dataclasses
import os

import pytest
import torch

from qlora_ray.config import base_model_path
from qlora_ray.errors import GuardError
from qlora_ray.worker import setup
from tests.chaos.inject.sitecustomize import casting
from tests.integration import engines, tiny_models

EMBEDDED = base_model_path("embedded")
SHARED = {"ray": {"num_workers": 2}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_guard_passes_bytes_as_they_are(dtype, tmp_path, process_group):
    engines.build(tiny_models.make_config(EMBEDDED, **SHARED, quantization={"compute_dtype": dtype}), tmp_path)


def test_guard_stops_a_run_whose_packed_weights_were_cast(tmp_path, monkeypatch, process_group):
    monkeypatch.setattr(setup, "Engine", casting(setup.Engine))
    with pytest.raises(GuardError, match="bnb_4bit_quant_storage"):
        engines.build(tiny_models.make_config(EMBEDDED, **SHARED, quantization={"compute_dtype": "bfloat16"}), tmp_path)


def test_guard_stops_a_run_whose_loss_is_another_once_the_engine_has_the_model(tmp_path, monkeypatch, process_group):
    class Turning(setup.Engine):
        def __init__(self, model, *settings):
            for name, angles in model.named_buffers():
                angles.mul_(2 if name.endswith("inv_freq") else 1)
            super().__init__(model, *settings)

    monkeypatch.setattr(setup, "Engine", Turning)
    with pytest.raises(GuardError, match="loss of one batch before sharding"):
        engines.build(tiny_models.make_config(EMBEDDED), tmp_path)


def test_guard_stops_a_run_that_has_another_share_in_4_bits_than_was_planned(tmp_path, process_group):
    run = engines.run_of(tiny_models.make_config(EMBEDDED), tmp_path, engines.rows_of_batch(tmp_path / "cache"))
    planned = dataclasses.replace(run.plan, four_bit_share=run.plan.four_bit_share - 0.02)
    with pytest.raises(GuardError, match="are in 4 bits, the plan says"):
        setup.build_engine(
            dataclasses.replace(run, plan=planned), engines.Alone(), torch.device("cpu"), pad_token_id=0, resumed=None
        )


@pytest.mark.bites("worker.setup.NOISE")
def test_neftune_noise_is_there_in_training_only(tmp_path, process_group):
    rows = tiny_models.batch()

    def loss(alpha: float, training: bool) -> float:
        config = tiny_models.make_config(EMBEDDED, training={"neftune_noise_alpha": alpha})
        model = engines.build(config, tmp_path / f"{alpha} {training}").module
        model.train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            return float(model(**rows, use_cache=False).loss)

    assert loss(5.0, training=True) != loss(0.0, training=True)
    assert loss(5.0, training=False) == loss(0.0, training=False)


@pytest.mark.parametrize("recompute, first", [("none", "training.recompute=all"), ("auto", "a lower training.memory")])
def test_out_of_memory_names_what_helps_in_order_with_what_each_would_save(recompute, first, tmp_path):
    config = tiny_models.make_config(EMBEDDED, training={"batch_size": 4, "max_length": 64})
    plan = dataclasses.replace(engines.plan_of(config, engines.rows_of_batch(tmp_path)), recompute=recompute)
    said = setup.out_of_memory_message(config, plan, 1, torch.OutOfMemoryError("CUDA out of memory.\nmore"))
    assert said.startswith(f"worker 1 is out of memory (CUDA out of memory.). What helps, in order: {first}")
    keys = ["training.batch_size=2 (about ", "training.max_length=32 (about ", "deepspeed.offload_params=cpu (about "]
    assert sorted(keys, key=said.index) == keys and "more" not in said


@pytest.mark.parametrize(
    "length, shares, kind, grows",
    [
        (16384, False, "cuda", True),
        (16384, True, "cuda", False),
        (8192, False, "cuda", False),
        (16384, False, "cpu", False),
    ],
)
def test_pieces_of_gpu_memory_grow_where_rows_are_long(length, shares, kind, grows, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "mine")
    config = tiny_models.make_config(EMBEDDED, training={"max_length": length})
    plan = dataclasses.replace(engines.plan_of(config, engines.rows_of_batch(tmp_path)), shares_base=shares)
    setup.choose_memory(config, plan, torch.device(kind))
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "mine"  # what a user asked for stays
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    setup.choose_memory(config, plan, torch.device(kind))
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None) == ("expandable_segments:True" if grows else None)
