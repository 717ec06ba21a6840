"""A base whose files do not fill its model is refused by name on every path; what only looks odd is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_ray import evaluate, export, generate, plan, train
from qlora_ray.config import ModelConfig, base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.inference import merge, verify
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import build_without_weights, count_bytes, count_parameters, load_base
from qlora_ray.model.facts import read_facts
from qlora_ray.model.record import FILE, base_tensors, open_adapter
from qlora_ray.planning.early import exact_facts
from tests.integration import adapters, tiny_models

CPU = torch.device("cpu")
EMBEDDED = base_model_path("embedded")
DOWN = "model.layers.1.mlp.down_proj.weight"


def change(folder: Path | str, **changes: torch.Tensor | None) -> None:
    """Put tensors into a folder's file, or take them out with None; "/" stands for "." in their names."""
    file = Path(folder) / "model.safetensors"
    weights = load_file(file) | {name.replace("/", "."): value for name, value in changes.items()}
    kept = {name: value.clone() for name, value in weights.items() if value is not None}
    save_file(kept, file, {"format": "pt"})


def configure(folder: Path | str, **values) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(folder: Path | str, **sections):
    config = tiny_models.make_config(str(folder), **sections)
    return load_base(config.model, config.quantization, "float32", CPU)


def refusals(folder: Path | str, **sections) -> list[str]:
    """What the driver says of a base before a worker is there, and what loading it says."""
    config = tiny_models.make_config(str(folder), **sections)
    said = []
    for look in (exact_facts, lambda config: load_base(config.model, config.quantization, "float32", CPU)):
        with pytest.raises(ConfigError) as caught:
            look(config)
        said.append(str(caught.value))
    return said


def check_loads_as_planned(folder: Path | str) -> None:
    """The base loads, its logits are those of plain transformers, and its 4-bit share is the plan's."""
    facts, stored = exact_facts(tiny_models.make_config(str(folder))), count_bytes(load(folder))
    assert (facts.num_linear_parameters, facts.num_parameters) == (stored.four_bit_parameters, stored.parameters)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load(folder, quantization={"type": "none"})
    assert torch.equal(tiny_models.logits(ours), tiny_models.logits(exact))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({DOWN: None}, f"without {DOWN}. Download or copy it again"),
        ({"lm_head/weight": None}, "without lm_head.weight. It was saved without its output layer"),
        ({"model/strange": torch.zeros(3)}, "not part of it model.strange"),
        ({"model/norm/weight": torch.zeros(5)}, "of another shape model.norm.weight (5,) in place of (64,)"),
        ({"model/layers/2/mlp/down_proj/weight": torch.zeros(64, 128)}, "not part of it model.layers.2.mlp.down_proj"),
        (
            {"model/layers/0/self_attn/q_proj/bias": torch.zeros(64)},  # which this config switches off
            "not part of it model.layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_weights_that_are_missing_unknown_or_of_another_shape_are_named(tmp_path, quantization, changes, said):
    folder = tiny_models.save("llama", tmp_path)
    change(folder, **changes)
    for message in refusals(folder, quantization={"type": quantization}):
        assert "its files are not those of the LlamaForCausalLM that its config.json describes" in message
        assert said in message


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_any_family_without_one_of_its_weights_is_refused_by_name(family, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    names = sorted(base_tensors(folder, "").entries)
    gone = [name for name in names if ".1." in name and name.endswith(".weight")][-1]
    change(folder, **{gone: None})
    with pytest.raises(ConfigError) as caught:
        exact_facts(tiny_models.make_config(folder))
    assert gone in str(caught.value)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_not_as_many_as_config_says_are_refused(family, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    change(folder, **{name: None for name in base_tensors(folder, "").entries if ".experts.3." in name})
    assert all("of another shape" in message and ".experts." in message for message in refusals(folder))
    gone = next(name for name in base_tensors(folder, "").entries if ".experts.1." in name)
    change(folder, **{gone: None})
    with pytest.raises(ConfigError, match=f"without {gone}"):
        read_facts(folder)


def test_doors_refuse_a_base_that_is_not_whole_before_anything_starts(refused, tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "base")
    adapter = adapters.trained(tmp_path / "run", str(folder), steps=1)
    change(folder, **{DOWN: None})
    record = json.loads((adapter / FILE).read_text())  # an adapter that was trained on noise, by an earlier version
    record["base"]["sample_sha256"] = base_tensors(str(folder), "").sample_sha256()
    (adapter / FILE).write_text(json.dumps(record))
    assert f"without {DOWN}" in refused(generate, "--adapter", adapter, "--prompt", "x")
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"instruction": "Say yes.", "output": "yes"}) + "\n")
    assert f"without {DOWN}" in refused(evaluate, "--adapter", adapter, "--file", records)
    for into in ("training", "original"):
        arguments = ["--adapter", adapter, "--to", "merged", "--into", into, "--output", tmp_path / "merged"]
        assert f"without {DOWN}" in refused(export, *arguments)
    assert not (tmp_path / "merged").exists()


def test_verifying_refuses_a_merged_model_that_is_not_whole(tmp_path):
    adapter = adapters.trained(tmp_path / "run", EMBEDDED, steps=1)
    merge.merge(open_adapter(str(adapter)), tmp_path / "merged", "training", "float32", CPU)
    change(tmp_path / "merged", **{DOWN: None})
    with pytest.raises(ConfigError, match=f"without {DOWN}"):
        verify.load_merged(tmp_path / "merged", "float32", CPU)


def test_verifying_runs_the_code_of_a_model_only_where_it_is_trusted(tmp_path):
    folder = tiny_models.save("llama", tmp_path)
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n"
    (tmp_path / "own.py").write_text(code + "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n")
    configure(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        verify.load_merged(tmp_path, "float32", CPU)
    assert type(verify.load_merged(tmp_path, "float32", CPU, trust_remote_code=True)).__name__ == "Own"
    assert count_parameters(build_without_weights(folder, trust_remote_code=True), folder)[0] > 0


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit bitsandbytes"),
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_base_that_is_stored_quantized_otherwise_is_refused_by_its_method(
    refused, tmp_path, stored, name, quantization
):
    folder = tiny_models.save("llama", tmp_path)
    configure(folder, quantization_config=stored)
    message = refused(train, f"model.base_model={folder}", f"quantization.type={quantization}")
    assert f"its weights are stored quantized ({name}, quantization_config in config.json)" in message
    assert "Name the model that it was quantized from" in message


def test_packed_weights_without_a_word_in_config_are_refused_by_name(tmp_path):
    folder = tiny_models.save("llama", tmp_path)
    stem = DOWN.removesuffix("weight")
    packed = {f"{stem}qweight": torch.zeros(16, 64, dtype=torch.int32), f"{stem}scales": torch.zeros(1, 64)}
    change(folder, **{DOWN: None}, **packed)
    for message in refusals(folder, quantization={"type": "none"}):
        assert f"without {DOWN}" in message and f"not part of it {stem}qweight, {stem}scales" in message


def test_base_in_bitsandbytes_4_bit_is_planned_trained_on_and_answered_with(tmp_path):
    stored = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four_bit = BitsAndBytesConfig(load_in_4bit=True, **stored)
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(EMBEDDED, quantization_config=four_bit).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    plain, packed = read_facts(EMBEDDED), read_facts(str(folder))
    assert sorted(packed.linear_shapes) == sorted(plain.linear_shapes)
    assert packed.num_parameters == plain.num_parameters
    facts, found = exact_facts(tiny_models.make_config(str(folder))), count_bytes(load(folder))
    assert (facts.num_linear_parameters, facts.num_parameters) == (found.four_bit_parameters, found.parameters)
    adapter = adapters.trained(tmp_path / "run", str(folder), steps=1)
    assert generate.main(["--adapter", str(adapter), "--prompt", "x", "max_new_tokens=1"]) == 0


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quantization": {"type": "none"}}, "quantization.type=none: model.base_model="),
        ({"quantization": {"type": "fp4"}}, "quantization.type=fp4: model.base_model="),
        ({"quantization": {"double_quant": False}}, "quantization.double_quant=false: model.base_model="),
        ({"model": {"lora_variant": "loftq"}}, "model.lora_variant=loftq: needs the unquantized weights"),
    ],
)
def test_base_in_4_bit_is_refused_where_the_config_asks_for_another_kind(tmp_path, section, said):
    folder = tiny_models.save("llama", tmp_path)
    stored = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, **stored})
    with pytest.raises(ConfigError) as caught:
        exact_facts(tiny_models.make_config(folder, **section))
    assert said in str(caught.value)


def test_output_layer_that_is_the_embedding_once_more_is_loaded_and_counted_once(tmp_path):
    folder = tiny_models.save("llama", tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, **{"lm_head/weight": embedding})
    check_loads_as_planned(folder)
    facts = read_facts(folder)
    assert facts.num_parameters == count_parameters(build_without_weights(folder), folder)[1]
    change(folder, **{"lm_head/weight": embedding + 1})  # then transformers does not tie them
    check_loads_as_planned(folder)


def test_masks_and_frequencies_of_older_files_are_no_parameters(tmp_path):
    masks = torch.ones(1, 1, 128, 128)
    older = {
        "gpt2": {"transformer/h/0/attn/bias": masks, "transformer/h/0/attn/masked_bias": torch.tensor(-1e4)},
        "gpt_neox": {"gpt_neox/layers/0/attention/bias": masks, "gpt_neox/layers/0/attention/masked_bias": masks[0]},
        "llama": {"model/layers/0/self_attn/rotary_emb/inv_freq": torch.ones(8)},
    }
    for family, tensors in older.items():
        folder = tiny_models.save(family, tmp_path / family)
        before = read_facts(folder).num_parameters
        change(folder, **tensors)
        check_loads_as_planned(folder)
        assert abs(read_facts(folder).num_parameters - before) <= 8


def test_files_without_the_models_prefix_and_a_tied_head_are_loaded(tmp_path):
    folder = tiny_models.save("gpt2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    check_loads_as_planned(folder)


def test_vision_tower_beside_a_text_model_is_left_out(tmp_path):
    folder = tiny_models.save("llama", tmp_path)
    tower = {"vision_tower/encoder/layers/0/fc1/weight": torch.ones(300, 300), "mm_projector/weight": torch.ones(9, 9)}
    change(folder, **tower)
    check_loads_as_planned(folder)


def test_files_that_hold_no_weights_are_refused(refused, tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "base")
    save_file({"model.norm.weight": torch.zeros(0)}, folder / "model.safetensors", {"format": "pt"})
    for door in (train, plan):
        assert "hold no weights" in refused(door, f"model.base_model={folder}")


def test_plan_reads_a_hub_base_from_the_cache_and_downloads_nothing(hub, capsys, refused):
    hub("someone/tiny", EMBEDDED)
    assert plan.main(["model.base_model=someone/tiny"]) == 0
    assert "someone/tiny: 3.5 M parameters" in capsys.readouterr().out
    message = refused(plan, "model.base_model=someone/else")
    assert "no such folder, and not in the hub's cache" in message and "hf download someone/else" in message


def test_hub_snapshot_without_weights_is_refused_before_ray_starts(hub, refused):
    snapshot = hub("someone/empty", EMBEDDED)
    (snapshot / "model.safetensors").unlink()
    for door in (train, plan):
        message = refused(door, "model.base_model=someone/empty")
        assert "no weights (*.safetensors, or pytorch_model.bin) in the folder" in message


def test_loftq_reads_the_weights_of_a_hub_base(hub):
    hub("someone/tiny", tiny_models.save("llama", hub("someone/other", EMBEDDED).parent / "made"))
    config = tiny_models.make_config("someone/tiny", model={"lora_variant": "loftq"})
    base = load_base(config.model, config.quantization, "float32", CPU)
    adapted = add_adapter(base, config.model, torch.float32, 0)
    assert all(parameter.abs().sum() > 0 for name, parameter in trainable(adapted).items() if "lora_B" in name)


def test_doctor_finds_what_is_wrong_with_a_cached_hub_base(hub):
    from qlora_ray.cluster import node_facts

    def ask(name: str) -> dict:
        return node_facts._base(node_facts.Question(ModelConfig(base_model=name), None, ".probe", "", ask_hub=False))

    snapshot = hub("someone/tiny", EMBEDDED)
    assert ask("someone/tiny") == {"here": True, "why": "in the hub's cache"}
    (snapshot / "model.safetensors").unlink()
    assert "no weights (*.safetensors" in ask("someone/tiny")["why"]
    assert not ask("someone/else")["here"]
