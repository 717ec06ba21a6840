"""What a merged model promises: it answers as the adapter on its 4-bit base does, and plain transformers loads it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_ray import export
from qlora_ray.config import base_model_path
from qlora_ray.inference import merge, verify
from qlora_ray.inference.load import load
from qlora_ray.model.base import four_bit_modules, load_base
from qlora_ray.model.record import FILE, open_adapter
from tests.integration import adapters, tiny_models

CPU = torch.device("cpu")
EMBEDDED = base_model_path("embedded")
BF16_EPSILON = 2**-8  # relative error of rounding to bfloat16
# Of the largest logit. W + BA is rounded once, where the adapter adds after two products: float32 is good to 1e-6 a
# layer. A LoRA with a wrong scale, or left out of one layer, moves logits by a hundredth and more.
FLOAT32_DRIFT = 2e-5


def drift_of(adapter, target, dtype, into="training"):
    """Merge, load with plain transformers, and compare."""
    opened = open_adapter(str(adapter))
    merge.merge(opened, target, into, dtype, CPU)
    loaded = load(opened, CPU)
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    return verify.measure(loaded, merged, adapters.examples(), 2, 16)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "phi3"])
def test_merged_model_equals_the_adapter_within_rounding(family, tmp_path):
    adapter = adapters.trained(tmp_path / "run", tiny_models.save(family, tmp_path / "base"))
    exact = drift_of(adapter, tmp_path / "float32", "float32")
    assert exact.max_logit_drift < FLOAT32_DRIFT * exact.max_logit
    assert exact.merged_loss == pytest.approx(exact.adapter_loss, abs=1e-5)
    rounded = drift_of(adapter, tmp_path / "bfloat16", "bfloat16")
    assert rounded.max_logit_drift < 4 * BF16_EPSILON * rounded.max_logit
    assert rounded.num_greedy_tokens == 32 and rounded.changed_greedy_tokens <= 0.005
    original = drift_of(adapter, tmp_path / "original", "float32", into="original")
    assert original.mean_kl > 100 * exact.mean_kl  # other weights than it was trained on: other answers


@pytest.mark.parametrize("variant", ["rslora", "dora", "loftq"])
def test_merging_scales_as_the_variant_does(variant, tmp_path):
    adapter = adapters.trained(tmp_path / "run", EMBEDDED, steps=6, lora_variant=variant, lora_alpha=12)
    drift = drift_of(adapter, tmp_path / "merged", "float32")
    assert drift.max_logit_drift < FLOAT32_DRIFT * drift.max_logit


def test_layers_without_a_lora_are_the_trained_on_ones_too(tmp_path):
    adapter = adapters.trained(tmp_path / "run", EMBEDDED, steps=6, target_modules=["q_proj"])
    drift = drift_of(adapter, tmp_path / "merged", "float32")
    assert drift.max_logit_drift < FLOAT32_DRIFT * drift.max_logit


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.bites("model.base.LAYERS_BY_NAME")
def test_four_bit_modules_are_those_that_loading_packs(family, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    config = tiny_models.make_config(folder)
    loaded = load_base(config.model, config.quantization, "float32", CPU)
    packed = {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    assert set(four_bit_modules(folder)[0]) == packed


def test_tied_embeddings_stay_tied_and_shards_stay_shards(tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(EMBEDDED).save_pretrained(base, max_shard_size="3MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{EMBEDDED}/{name}", base)
    adapter = adapters.trained(tmp_path / "run", str(base), steps=6)
    drift = drift_of(adapter, tmp_path / "merged", "bfloat16")
    assert drift.max_logit_drift < 4 * BF16_EPSILON * drift.max_logit
    names = {path.name for path in base.glob("*.safetensors*")}
    assert len(names) > 2 and {path.name for path in (tmp_path / "merged").glob("*.safetensors*")} == names
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_adapted_tied_output_layer_is_refused(tmp_path):
    adapter = adapters.trained(tmp_path / "run", EMBEDDED, steps=1, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="no weight lm_head.weight: it is tied"):
        merge.plan_merge(open_adapter(str(adapter)), "training", "bfloat16", CPU)


def test_adapted_output_layer_is_merged_as_the_16_bit_layer_that_it_was_in_training(tmp_path):
    base = tiny_models.save("llama", tmp_path / "base")
    adapter = adapters.trained(tmp_path / "run", base, target_modules=["q_proj", "lm_head"])
    recorded = json.loads((adapter / FILE).read_text())["four_bit_layers"]
    assert len(recorded) == 14 and "model.layers.1.mlp.down_proj" in recorded and "lm_head" not in recorded
    drift = drift_of(adapter, tmp_path / "merged", "float32")
    assert drift.max_logit_drift < 2e-5 * drift.max_logit


def test_adapter_of_an_earlier_version_whose_record_names_no_layers_is_merged_the_same(tmp_path):
    base = tiny_models.save("llama", tmp_path / "base")
    adapter = adapters.trained(tmp_path / "run", base, steps=6, target_modules=["q_proj", "lm_head"])
    record = json.loads((adapter / FILE).read_text())
    del record["four_bit_layers"]
    (adapter / FILE).write_text(json.dumps(record))
    drift = drift_of(adapter, tmp_path / "merged", "float32")
    assert drift.max_logit_drift < 2e-5 * drift.max_logit


def test_door_verifies_writes_the_proof_and_refuses_above_a_limit(tmp_path, capsys):
    adapter = adapters.trained(tmp_path / "run", EMBEDDED, steps=6)
    records = tmp_path / "records.jsonl"
    turns = [{"instruction": f"Say {word}.", "output": word} for word in ("yes", "no", "red", "blue")]
    records.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    arguments = ["--adapter", str(adapter), "--to", "merged", "--verify", "--file", str(records)]
    assert export.main([*arguments, "--output", str(tmp_path / "good")]) == 0
    proof = json.loads((tmp_path / "good" / "verification.json").read_text())
    assert proof["num_rows"] == 4 and proof["mean_kl"] < 1e-3 and proof["into"] == "training"
    capsys.readouterr()
    assert export.main([*arguments, "--output", str(tmp_path / "bad"), "--max-kl", "0"]) == 1
    assert "--max-kl allows 0.0" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "bad" in path.name]


@pytest.mark.slow
def test_merging_needs_less_memory_than_two_layers(tmp_path):
    """16 layers of 101 MB in bf16: the process must not grow by two of them, though the model is eight times that."""
    sizes = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=16)
    config = AutoConfig.for_model("llama", **{**tiny_models.SIZES, **sizes, "num_hidden_layers": 16})
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "base", max_shard_size="500MB")
    del model
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{EMBEDDED}/{name}", tmp_path / "base")
    adapter = adapters.trained(tmp_path / "run", str(tmp_path / "base"), dtype="bfloat16", steps=1)
    code = f"""
import resource, torch
from pathlib import Path
from qlora_ray.model.record import FILE, open_adapter
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from qlora_ray.inference import merge
dequantize_4bit(*quantize_4bit(torch.ones(64, 64), quant_type="nf4"))  # libraries load
adapter = open_adapter({str(adapter)!r})
merge.plan_merge(adapter, "training", "bfloat16", torch.device("cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge.merge(adapter, Path({str(tmp_path / "merged")!r}), "training", "bfloat16", torch.device("cpu"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown = int(ran.stdout.split()[-1])
    assert grown < 2 * layer, f"{grown / layer:.2f} layers"
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
