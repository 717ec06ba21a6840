"""Names in the adapter's settings: what they mean is counted, and what means nothing is refused before a worker is."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_ray import plan, train
from qlora_ray.config import base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.inference.merge import merge
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import load_base
from qlora_ray.model.fused import is_fused
from qlora_ray.model.record import open_adapter
from qlora_ray.planning.early import exact_facts
from qlora_ray.storage import open_folder
from qlora_ray.worker.export import write_adapter
from tests.integration import adapters, engines, tiny_models

CPU = torch.device("cpu")


def refusal(**model) -> str:
    with pytest.raises(ConfigError) as refused:
        exact_facts(tiny_models.make_config("embedded", model=model))
    return str(refused.value)


def test_entry_that_matches_no_layer_is_refused_with_the_nearest_names():
    said = refusal(target_modules=["q_proj", "vproj"])
    assert said.startswith("model.target_modules=vproj: matches no layer of the ")
    assert "Nearest: v_proj" in said
    assert "Layers that it may name: q_proj, k_proj" in refusal(target_modules=["zzz"])


def test_text_that_matches_no_layer_is_explained():
    said = refusal(target_modules="q_proj")
    assert "a text is a regular expression of a layer's whole name, such as model.layers.0.self_attn.q_proj" in said
    assert "Write a list, [q_proj]" in said
    assert "is not a regular expression" in refusal(target_modules="(q_proj")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"exclude_modules": ["o_prj"]}, "model.exclude_modules=o_prj: matches no layer"),
        ({"exclude_modules": ["lm_head"]}, "model.exclude_modules=lm_head: matches no layer"),  # it gets none anyway
        ({"rank_pattern": {"oproj": 4}}, "model.rank_pattern=oproj: matches no layer"),
        ({"alpha_pattern": {"o_proj": 4}, "exclude_modules": ["o_proj"]}, "model.alpha_pattern=o_proj: matches no"),
    ],
)
def test_what_excludes_or_changes_nothing_is_refused(setting, said):
    assert refusal(**setting).startswith(said)


def test_typo_ends_every_door_with_exit_code_2(refused):
    typo = "model.target_modules=[q_proj,vproj]"
    for door in (plan, train):
        assert "model.target_modules=vproj" in refused(door, typo)


def save_moe(folder) -> str:
    """A mixture of experts with a shared expert beside them, which is not adapted with them."""
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    sizes = {**tiny_models.SIZES, **more, "shared_expert_intermediate_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_path("embedded")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "model",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"exclude_modules": r".*\.1\..*", "rank_pattern": {"o_proj": 3, "mlp.up_proj": 20}},
        {"lora_variant": "dora", "exclude_modules": ["down_proj"]},
    ],
)
def test_plan_counts_what_training_has(model, tmp_path):
    config = tiny_models.make_config(tiny_models.save("llama", tmp_path), model=model)
    facts = exact_facts(config)
    base = load_base(config.model, config.quantization, "float32", CPU)
    adapted = add_adapter(base, config.model, torch.float32, seed=0)
    assert facts.num_trainable_parameters == sum(parameter.numel() for parameter in trainable(adapted).values())
    layers = {name.partition(".lora_A")[0] for name in trainable(adapted) if "lora_A" in name}
    assert sum(facts.adapted_layers.values()) == len(layers)


def test_plan_counts_experts_and_what_lies_beside_them_as_training_has_them(tmp_path):
    config = tiny_models.make_config(save_moe(tmp_path))
    base = load_base(config.model, config.quantization, "float32", CPU)
    adapted = trainable(add_adapter(base, config.model, torch.float32, seed=0))
    assert exact_facts(config).num_trainable_parameters == sum(parameter.numel() for parameter in adapted.values())


PATTERNS = {
    "rank_pattern": {"o_proj": 3, "up_proj": 12}, "alpha_pattern": {r"0\.mlp\.up_proj": 5.0},
    "exclude_modules": ["k_proj"],
}  # fmt: skip


def test_patterns_and_exclusions_are_trained_in_fused_layers_and_reload_in_plain_peft(tmp_path, process_group):
    base = tiny_models.save("llama", tmp_path / "base")
    config = tiny_models.make_config(base, model=PATTERNS, deepspeed={"zero_stage": 3})
    engine = engines.build(config, tmp_path)
    assert is_fused(engine.module)
    losses = engines.train(engine, range(8))
    assert losses[-1] < losses[0] - 0.05
    adapter = open_folder(str(tmp_path / "adapter"))
    write_adapter(adapter, engine.module, engine.weights(), AutoTokenizer.from_pretrained(base))
    plain = PeftModel.from_pretrained(load_base(config.model, config.quantization, "float32", CPU), adapter.path)
    assert tiny_models.difference(tiny_models.logits(engine.module), tiny_models.logits(plain)) < 1e-5


def test_patterns_and_exclusions_merge_to_the_same_logits_and_stand_on_the_card(tmp_path):
    base = tiny_models.save("llama", tmp_path / "base")
    folder = adapters.trained(tmp_path / "run", base, steps=3, **PATTERNS)
    adapter = open_adapter(str(folder))
    merge(adapter, tmp_path / "merged", "training", "float32", CPU)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    frozen = load_base(adapter.model, adapter.quantization, "float32", CPU)
    plain = PeftModel.from_pretrained(frozen, str(folder))
    assert tiny_models.difference(tiny_models.logits(merged), tiny_models.logits(plain)) < 1e-5
    card = (folder / "README.md").read_text()
    assert "without k_proj" in card and "r 3 in o_proj, 12 in up_proj" in card
