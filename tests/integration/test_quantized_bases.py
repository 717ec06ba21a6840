"""Bases stored in bitsandbytes' 4 bits count, plan and compute as the dense ones; other kinds name the way out."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_ray import evaluate, export, generate, train
from qlora_ray.config import as_written, base_model_path, make_config
from qlora_ray.errors import ConfigError
from qlora_ray.model.base import count_bytes, load_base
from qlora_ray.model.facts import read_facts
from qlora_ray.planning.early import as_stored, exact_facts
from qlora_ray.planning.plan import storage_bytes
from tests.integration import adapters, engines, own_models, tiny_models

EMBEDDED = base_model_path("embedded")
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def save(folder: Path, **more) -> str:
    """The embedded base in 4 bits."""
    how = BitsAndBytesConfig(load_in_4bit=True, **{**NF4, **more})
    AutoModelForCausalLM.from_pretrained(EMBEDDED, quantization_config=how).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return str(folder)


def load(folder: str):
    config = tiny_models.make_config(folder)
    return load_base(config.model, config.quantization, "float32", torch.device("cpu"))


def test_sizes_of_a_4_bit_base_are_those_of_the_dense_one(tmp_path):
    folder = save(tmp_path / "base")
    config, plain, packed = tiny_models.make_config(folder), read_facts(EMBEDDED), read_facts(folder)
    num_trained = exact_facts(config).num_trainable_parameters
    assert num_trained == exact_facts(tiny_models.make_config(EMBEDDED)).num_trainable_parameters > 0
    assert storage_bytes(config, num_trained) < 2**27
    assert packed.num_linear_parameters == plain.num_linear_parameters


def test_layers_that_the_folder_keeps_in_16_bits_are_counted_so(tmp_path):
    folder = save(tmp_path / "base", llm_int8_skip_modules=["lm_head", "down_proj"])
    facts, found = exact_facts(tiny_models.make_config(folder)), count_bytes(load(folder))
    assert (facts.num_linear_parameters, facts.num_parameters) == (found.four_bit_parameters, found.parameters)
    assert found.four_bit_parameters < exact_facts(tiny_models.make_config(EMBEDDED)).num_linear_parameters


def test_settings_of_the_folder_win_where_the_config_says_none_and_the_plan_says_so(tmp_path, refused):
    folder = save(tmp_path / "base", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    config = as_stored(tiny_models.make_config(folder))
    assert (config.quantization.type, config.quantization.double_quant) == ("fp4", False)
    planned = engines.plan_of(config, engines.rows_of_batch(tmp_path / "rows"))
    assert any("trained on as it is: quantization.type=fp4, double_quant=false" in note for note in planned.notes)
    assert as_stored(config) == config and exact_facts(config)  # as its run directory has it
    written = make_config(as_written(tiny_models.make_config(folder, training={"max_length": 64})))
    assert as_stored(written).quantization == config.quantization  # of a sweep's trial
    for asked in ("quantization.type=nf4", "quantization.double_quant=true"):
        message = refused(train, f"model.base_model={folder}", asked)
        assert f"{asked}: model.base_model=" in message and "Leave the setting out" in message


def test_folder_that_holds_other_layers_in_4_bits_than_its_config_says_is_refused(tmp_path):
    folder = save(tmp_path / "base", llm_int8_skip_modules=["lm_head", "down_proj"])
    stored = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    own_models.change(Path(folder), quantization_config={**stored, "llm_int8_skip_modules": ["lm_head"]})
    with pytest.raises(ConfigError, match="one that differs is model.layers.*down_proj.weight. Name in llm_int8_skip"):
        exact_facts(tiny_models.make_config(folder))


def test_4_bit_base_computes_in_the_dtype_of_the_plan_whatever_it_was_saved_with(tmp_path):
    ours = load(save(tmp_path / "base", bnb_4bit_compute_dtype=torch.bfloat16))
    exact = load(save(tmp_path / "same", bnb_4bit_compute_dtype=torch.float32))
    assert torch.equal(tiny_models.logits(ours), tiny_models.logits(exact))


def test_4_bit_bytes_that_zero_would_cast_are_refused(tmp_path):
    folder = save(tmp_path / "base")
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, **NF4, "bnb_4bit_quant_storage": "bfloat16"}
    own_models.change(Path(folder), quantization_config=stored)
    with pytest.raises(ConfigError, match="stored as bfloat16"):
        exact_facts(tiny_models.make_config(folder))


def test_refusal_names_the_dense_original_where_the_config_tells_it(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "base")
    quantized = {"quant_method": "gptq", "bits": 4}
    own_models.change(Path(folder), quantization_config=quantized, _name_or_path="someone/dense")
    with pytest.raises(ConfigError, match=r"quantized from \(its config.json says someone/dense\)"):
        exact_facts(tiny_models.make_config(folder))


def test_doors_take_the_adapter_of_a_4_bit_base_and_merging_says_what_to_do(tmp_path, refused):
    adapter = adapters.trained(tmp_path / "run", save(tmp_path / "base"), steps=1)
    assert generate.main(["--adapter", str(adapter), "--prompt", "x", "max_new_tokens=1"]) == 0
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"instruction": "Say yes.", "output": "yes"}) + "\n")
    assert evaluate.main(["--adapter", str(adapter), "--file", str(records)]) == 0
    message = refused(export, "--adapter", adapter, "--to", "merged", "--output", tmp_path / "merged")
    assert "Serve the adapter unmerged, or train on the model that its base was quantized from" in message
