"""Every model family: sharded 4-bit training works, and the adapter is the live model's in plain PEFT."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import count_bytes, load_base
from qlora_ray.planning.early import exact_facts
from qlora_ray.storage import open_folder
from qlora_ray.worker.export import write_adapter
from tests.integration import engines, tiny_models


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_family_trains_under_zero3_and_its_adapter_reloads_in_plain_peft(family, tmp_path, process_group):
    folder = tiny_models.save(family, tmp_path / "base")
    config = tiny_models.make_config(folder, deepspeed={"zero_stage": 3})
    engine = engines.build(config, tmp_path)
    losses = engines.train(engine, range(8))
    assert losses[-1] < losses[0] - 0.05

    adapter = open_folder(str(tmp_path / "adapter"))
    write_adapter(adapter, engine.module, engine.weights(), AutoTokenizer.from_pretrained(folder))
    base = load_base(config.model, config.quantization, "float32", torch.device("cpu"))
    plain = PeftModel.from_pretrained(base, adapter.path)
    live = tiny_models.logits(engine.module)
    assert tiny_models.difference(live, tiny_models.logits(plain)) < 1e-5
    with plain.disable_adapter():
        assert tiny_models.difference(live, tiny_models.logits(plain)) > 1e-3


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_plan_knows_what_really_becomes_4_bit_and_what_is_trained(family, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    config = tiny_models.make_config(folder)
    base = load_base(config.model, config.quantization, "float32", torch.device("cpu"))
    stored = count_bytes(base)
    facts = exact_facts(config)
    assert facts.num_packed_parameters == stored.four_bit_parameters > 0
    assert facts.num_parameters == stored.parameters
    assert (facts.experts is not None) == (family in ("mixtral", "qwen3_moe"))
    adapted = trainable(add_adapter(base, config.model, torch.float32, seed=0))
    assert facts.num_trainable_parameters == sum(parameter.numel() for parameter in adapted.values())
