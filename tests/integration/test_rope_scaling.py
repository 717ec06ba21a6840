"""model.rope_scaling: the base is transformers' own with that in its config.json, in training and wherever else."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_ray.config import base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.inference import merge
from qlora_ray.inference.load import load
from qlora_ray.model.base import load_base
from qlora_ray.model.card import render
from qlora_ray.model.facts import read_facts
from qlora_ray.model.meta import model_facts
from qlora_ray.model.record import FILE, open_adapter
from tests import fused_models
from tests.integration import adapters, tiny_models

CPU = torch.device("cpu")
KINDS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
REACH = {"linear": 512, "yarn": 128, "llama3": 1024}  # of 128 positions


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    families = ("llama", "qwen3", "glm4", "gpt_neox", "phi3", "gpt2", "gemma3_text", "opt")
    return {family: tiny_models.save(family, root / family) for family in families}


def with_config(folder, target, **more):
    """A copy of a base with more in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **more}))
    return str(target)


def facts(folder, scaling):
    return model_facts(folder, tiny_models.make_config(folder, model={"rope_scaling": scaling}).model, {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "glm4", "gpt_neox"])
def test_base_is_transformers_own_with_that_config(folders, family, kind, tmp_path):
    config = tiny_models.make_config(folders[family], model={"rope_scaling": KINDS[kind]})
    ours = load_base(config.model, config.quantization.model_copy(update={"type": "none"}), "float32", CPU)
    own = AutoConfig.from_pretrained(folders[family]).rope_parameters
    written = with_config(folders[family], tmp_path / "written", rope_parameters={**own, **KINDS[kind]})
    theirs, plain = (AutoModelForCausalLM.from_pretrained(one) for one in (written, folders[family]))
    assert torch.equal(tiny_models.logits(ours), tiny_models.logits(theirs))
    assert not torch.equal(tiny_models.logits(theirs), tiny_models.logits(plain))
    assert facts(folders[family], KINDS[kind]).context_length == REACH[kind]


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("family", ["qwen3", "glm4"])
def test_fused_layers_turn_as_the_scaling_says(folders, family, kind):
    found = [
        fused_models.nats_and_gradients(
            fused_models.build(folders[family], torch.float32, fused=fused, rope_scaling=KINDS[kind]),
            tiny_models.batch(),
        )
        for fused in (True, False)
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert fused_models.error(found[0][1], found[1][1]) < 1e-5


@pytest.mark.parametrize(
    "family, why",
    [("gpt2", "not turned by transformers' RoPE"), ("opt", "not turned by transformers' RoPE"),
     ("gemma3_text", "a RoPE for each kind of layer"), ("phi3", "phi3 models do not take it")],
)  # fmt: skip
def test_family_with_other_positions_is_refused_by_name(folders, family, why):
    with pytest.raises(ConfigError, match=f"model.rope_scaling=yarn: .*{why}.* Leave it out"):
        facts(folders[family], KINDS["yarn"])


def test_base_with_longrope_of_its_own_is_refused(folders, tmp_path):
    own = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8,
           "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}  # fmt: skip
    folder = with_config(folders["llama"], tmp_path / "base", rope_parameters=own)
    with pytest.raises(ConfigError, match="a RoPE of its own for long rows .longrope."):
        facts(folder, KINDS["yarn"])


@pytest.mark.parametrize(
    "scaling, said",
    [({"rope_type": "ntk", "factor": 4}, "must be linear, yarn, llama3"), ({"factor": 4}, "rope_type is None"),
     ({"rope_type": "linear"}, "linear needs factor"), ({"rope_type": "yarn", "factor": 1}, "factor is 1, and must be"),
     ({"rope_type": "yarn", "factor": "4"}, "factor is '4', and must be"),
     ({"rope_type": "linear", "factor": 4, "beta_fast": 32}, "linear has no beta_fast"),
     ({"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 32}, "must be less than beta_fast"),
     ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8192.5}, "a whole number"),
     ({"rope_type": "llama3", "factor": 4}, "llama3 needs low_freq_factor and high_freq_factor")],
)  # fmt: skip
def test_what_transformers_would_pass_over_is_refused(scaling, said):
    with pytest.raises(ValidationError, match=said):
        tiny_models.make_config("embedded", model={"rope_scaling": scaling})


@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling"])
def test_adapter_and_merged_model_keep_the_scaling(folders, style, tmp_path):
    """Of config.json in today's and in transformers 4's style, which the merged one keeps: servers read either."""
    base = folders["llama"]
    if style == "rope_scaling":
        base = with_config(base, tmp_path / "old", rope_theta=1e4, rope_scaling=None)
        config = json.loads((tmp_path / "old/config.json").read_text())
        (tmp_path / "old/config.json").write_text(json.dumps({k: config[k] for k in config if k != "rope_parameters"}))
    adapter = open_adapter(str(adapters.trained(tmp_path / "run", base, rope_scaling=KINDS["yarn"], steps=6)))
    assert json.loads((adapter.folder / FILE).read_text())["base"]["rope_scaling"] == KINDS["yarn"]
    assert adapter.context_length == REACH["yarn"] and '"rope_type": "yarn"' in render(adapter.record)
    merge.merge(adapter, tmp_path / "merged", "training", "float32", CPU)
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written[style]["factor"] == 4.0 and written["max_position_embeddings"] == 128
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours, theirs = tiny_models.logits(load(adapter, CPU).model), tiny_models.logits(merged)
    assert tiny_models.difference(ours, theirs) < 2e-5
    plain = with_config(tmp_path / "merged", tmp_path / "plain", **{style: {"rope_type": "default", "rope_theta": 1e4}})
    others = tiny_models.logits(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))
    assert tiny_models.difference(ours, others) > 1e-3


def test_adapter_is_not_gone_on_with_on_a_base_without_its_scaling(tmp_path):
    base = base_model_path("embedded")
    adapter = adapters.trained(tmp_path / "run", base, rope_scaling=KINDS["linear"], steps=1)
    model = tiny_models.make_config(base, model={"start_from": str(adapter)}).model
    with pytest.raises(ConfigError, match="was trained with model.rope_scaling=.*linear.* Give the same"):
        model_facts(base, model, {})
    again = model.model_copy(update={"rope_scaling": KINDS["linear"]})
    assert model_facts(base, again, {}).context_length == 4 * read_facts(base).context_length
