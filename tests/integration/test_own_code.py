"""Bases that transformers does not have: their own code runs only as it was read, or a user's function makes them."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_ray import evaluate, export, generate, train
from qlora_ray.cluster import node_facts
from qlora_ray.config import ModelConfig
from qlora_ray.errors import ConfigError
from qlora_ray.inference import verify
from qlora_ray.model.base import count_bytes, load_base
from qlora_ray.model.own_code import code_digest
from qlora_ray.model.record import FILE
from qlora_ray.planning.early import exact_facts
from tests.integration import adapters, many_runs, own_models, tiny_models

CPU = torch.device("cpu")
FACTORY = "tests.integration.own_models:make"


@pytest.fixture
def own(tmp_path) -> str:
    """A folder whose model is built by its own code."""
    return own_models.save_with_code(tmp_path / "own")


def trusting(folder: str) -> list[str]:
    return [f"model.base_model={folder}", "model.trust_remote_code=true", f"model.revision={code_digest(folder)}"]


def test_folder_that_needs_its_own_code_is_refused_with_the_digest_to_pin(own, refused):
    message = refused(train, f"model.base_model={own}")
    assert "is built by code of its own (modeling_own.py, own_config.py)" in message
    assert f"model.trust_remote_code=true and model.revision={code_digest(own)}" in message


@pytest.mark.parametrize("revision", [None, "a" * 40, "main"])
def test_folder_is_trusted_only_with_the_digest_of_its_code(own, refused, revision):
    pinned = [] if revision is None else [f"model.revision={revision}"]
    message = refused(train, f"model.base_model={own}", "model.trust_remote_code=true", *pinned)
    assert f"is {code_digest(own)}, not {revision}" in message and f"model.revision={code_digest(own)}" in message


@pytest.mark.parametrize("changed", ["modeling_own.py", "added.py", "below/added.py"])
def test_any_change_of_the_code_changes_its_digest(own, changed):
    before = code_digest(own)
    file = Path(own) / changed
    file.parent.mkdir(exist_ok=True)
    file.write_text((file.read_text() if file.exists() else "") + "\n")
    assert re.fullmatch("[0-9a-f]{40}", before) and code_digest(own) != before


def test_code_of_another_repository_is_refused_since_nothing_pins_it(own, refused):
    own_models.change(Path(own), auto_map={**own_models.MAP, "AutoModelForCausalLM": "someone/code--modeling_own.Own"})
    message = refused(train, *trusting(own))
    assert "its code lies in another repository (someone/code--modeling_own.Own in auto_map)" in message


def test_auto_map_beside_a_model_that_transformers_has_needs_no_trust(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "known")
    own_models.change(Path(folder), auto_map=own_models.MAP)
    assert exact_facts(tiny_models.make_config(folder)).model_type == "llama"


def test_snapshot_of_the_hub_is_pinned_by_its_commit(hub, refused, own):
    hub("someone/own", own)
    message = refused(train, "model.base_model=someone/own")
    assert f"model.trust_remote_code=true and model.revision={'a' * 40}" in message
    pinned = {"trust_remote_code": True, "revision": "a" * 40}
    assert exact_facts(tiny_models.make_config("someone/own", model=pinned)).model_type == "own"


def test_every_node_and_every_worker_checks_the_code(own):
    model = ModelConfig(base_model=own, trust_remote_code=True, revision=code_digest(own))

    def ask() -> dict:
        return node_facts._base(node_facts.Question(model, None, ".probe", "", ask_hub=False))

    config = tiny_models.make_config(own, model=model.model_dump(include={"trust_remote_code", "revision"}))
    assert ask()["here"] and type(load_base(config.model, config.quantization, "float32", CPU)).__name__ == "Own"
    (Path(own) / "own_config.py").write_text(own_models.CONFIG + "# changed on this node\n")
    assert not ask()["here"] and "digest of its code" in ask()["why"]
    with pytest.raises(ConfigError, match="digest of its code"):
        load_base(config.model, config.quantization, "float32", CPU)


def test_run_of_a_base_with_own_code_and_what_is_done_with_its_adapter(own, tmp_path, refused):
    ended = many_runs.run(
        *trusting(own), "training.max_steps=2", "training.max_length=128", "evaluation.num_prompts=2",
        "evaluation.max_new_tokens=4", f"ray.storage_path={tmp_path}", "ray.run_name=r",
        "ray.num_workers=1",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    adapter = tmp_path / "r" / "adapter"
    record = json.loads((adapter / FILE).read_text())["base"]
    assert record["revision"] == record["code"] == code_digest(own)
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["identity"]["base"]["code"] == code_digest(own)
    assert generate.main(["--adapter", str(adapter), "--prompt", "x", "max_new_tokens=1"]) == 0
    merged = tmp_path / "merged"
    assert export.main(["--adapter", str(adapter), "--to", "merged", "--output", str(merged)]) == 0
    assert type(verify.load_merged(merged, "float32", CPU, trust_remote_code=True)).__name__ == "Own"
    (Path(own) / "modeling_own.py").write_text(own_models.CODE + "# changed since\n")
    assert "digest of its code" in refused(generate, "--adapter", adapter, "--prompt", "x")


def test_architecture_that_nobody_knows_is_refused_with_the_way_out(tmp_path):
    folder = own_models.save_without_code(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"unheard_of.*model\.factory"):
        exact_facts(tiny_models.make_config(folder))


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("no.such:make", "cannot be imported"),
        ("tests.integration.own_models:no", "has no function no"),
        ("tests.integration.own_models:make_nothing", "returned a NoneType; must be a PreTrainedModel"),
    ],
)
def test_factory_that_makes_no_model_is_refused_by_name(tmp_path, factory, said):
    folder = own_models.save_without_code(tmp_path / "base")
    with pytest.raises(ConfigError, match=said) as refused:
        exact_facts(tiny_models.make_config(folder, model={"factory": factory}))
    assert str(refused.value).startswith(f"model.factory={factory}:")


def test_factory_makes_what_is_planned_loaded_packed_and_merged(tmp_path):
    folder = own_models.save_without_code(tmp_path / "base")
    config = tiny_models.make_config(folder, model={"factory": FACTORY})
    loaded = load_base(config.model, config.quantization, "float32", CPU)
    facts, found = exact_facts(config), count_bytes(loaded)
    assert type(loaded).__name__ == "Unheard" and found.four_bit_parameters > 0
    assert (facts.num_linear_parameters, facts.num_parameters) == (found.four_bit_parameters, found.parameters)
    plain = tiny_models.save("llama", tmp_path / "plain")
    exact = LlamaForCausalLM.from_pretrained(plain)
    config = tiny_models.make_config(folder, model={"factory": FACTORY}, quantization={"type": "none"})
    assert torch.equal(tiny_models.logits(load_base(config.model, config.quantization, "float32", CPU)),
                       tiny_models.logits(exact))  # fmt: skip
    adapter = adapters.trained(tmp_path / "run", folder, steps=2, factory=FACTORY)
    assert json.loads((adapter / FILE).read_text())["base"]["factory"] == FACTORY
    assert generate.main(["--adapter", str(adapter), "--prompt", "x", "max_new_tokens=1"]) == 0
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"instruction": "Say yes.", "output": "yes"}) + "\n")
    assert evaluate.main(["--adapter", str(adapter), "--file", str(records)]) == 0
    merged = tmp_path / "merged"
    arguments = ["--adapter", str(adapter), "--to", "merged", "--output", str(merged), "--file", str(records)]
    assert export.main([*arguments, "--verify"]) == 0
    own_models.change(merged, model_type="llama")
    AutoModelForCausalLM.from_pretrained(merged)
    assert load_file(merged / "model.safetensors").keys() == load_file(Path(folder) / "model.safetensors").keys()


def test_run_of_a_base_that_a_function_makes_keeps_the_function_in_its_identity(tmp_path):
    folder = own_models.save_without_code(tmp_path / "base")
    ended = many_runs.run(
        f"model.base_model={folder}", f"model.factory={FACTORY}", "training.max_steps=1", "training.max_length=128",
        "evaluation.num_prompts=0", f"ray.storage_path={tmp_path}", "ray.run_name=r",
        "ray.num_workers=1",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["identity"]["base"]["factory"] == FACTORY
