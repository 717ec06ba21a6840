"""A run that goes on from another one's adapter, or from one that plain PEFT wrote."""

import json
import shutil
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_ray import evaluate, export, train
from qlora_ray.config import base_model_path
from qlora_ray.model.start import copy_weights, open_start
from qlora_ray.model.tensors import TensorFiles
from qlora_ray.rundir import names
from qlora_ray.storage import open_folder
from tests.integration import adapters, door, engines, many_runs, tiny_models

WEIGHTS = "adapter_model.safetensors"


def settings(storage, name, start, num_workers, *more):
    return [
        "-c", "configs/quickstart.yaml", f"ray.storage_path={storage}", f"ray.run_name={name}",
        f"model.start_from={start}", "model.lora_r=8", f"ray.num_workers={num_workers}",
        f"training.gradient_accumulation_steps={2 // num_workers}", "training.batch_size=2", "training.max_steps=6",
        "logging.every_steps=1", "checkpoint.every_steps=2", "training.eval_every_steps=6", "evaluation.num_prompts=2",
        "evaluation.max_new_tokens=8", "data.validation_split=0.01",
        *more,
    ]  # fmt: skip


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def storage(tmp_path_factory, trained):
    """Where runs go on from `trained`; one has ended."""
    storage = tmp_path_factory.mktemp("runs")
    before = content(trained)
    ended = many_runs.run(*settings(storage, "one", trained.parent, 1))
    assert ended.returncode == 0, ended.stderr
    assert content(trained) == before
    return storage


def test_record_manifest_and_card_tell_what_was_gone_on_from(storage, trained):
    sha256 = door.sha256(trained / WEIGHTS)
    lineage = {"path": str(trained), "sha256": sha256, "run_name": trained.parent.name, "step": 6}
    for name in ("adapter", "adapter_best"):
        assert json.loads((storage / "one" / name / "qlora_ray.json").read_text())["start_from"] == lineage
    manifest = json.loads((storage / "one" / "manifest.json").read_text())
    assert manifest["start_from"] == lineage and manifest["identity"]["start_from"] == sha256
    card = (storage / "one" / "adapter" / "README.md").read_text()
    assert str(trained) in card and sha256 in card


def test_first_loss_is_that_of_the_adapter_and_not_of_the_base(storage, trained):
    fresh = many_runs.run(*settings(storage, "fresh", "null", 1, "training.max_steps=1", "training.eval_every_steps=1"))
    assert fresh.returncode == 0, fresh.stderr
    assert door.losses(storage / "fresh")[1] != door.losses(storage / "one")[1]
    before, after = load_file(trained / WEIGHTS), load_file(storage / "one" / "adapter" / WEIGHTS)
    assert before.keys() == after.keys()
    # Six small steps: near where it began, and not there.
    far = {name: float((after[name] - before[name]).norm() / before[name].norm()) for name in before}
    assert all(0 < distance < 0.5 for distance in far.values())


def test_two_workers_and_a_resumption_end_with_the_same_adapter(storage, trained):
    arguments = settings(storage, "two", trained.parent, 2)
    assert many_runs.run(*arguments).returncode == 0
    many_runs.go_back(storage / "two")
    resumed = many_runs.run(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    ended = (storage / "one", storage / "two", many_runs.whole(storage / "two"))
    assert len({door.sha256(run / "adapter" / WEIGHTS) for run in ended}) == 1


@pytest.mark.slow
def test_run_that_was_killed_ends_with_the_same_adapter(storage, trained, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = settings(storage, "killed", trained.parent, 2)
    process = door.start(*arguments)
    door.wait_for_step(storage / "killed", 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = many_runs.run(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert door.sha256(storage / "killed" / "adapter" / WEIGHTS) == door.sha256(storage / "one" / "adapter" / WEIGHTS)


def test_a_run_is_not_resumed_from_another_start(storage, trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    file = TensorFiles([other / WEIGHTS], "").entries
    entry = next(iter(file.values()))
    with open(other / WEIGHTS, "r+b") as damaged:
        damaged.seek(entry.offset)
        damaged.write(b"\1\2\3\4")
    message = many_runs.refused(*settings(storage, "one", other, 1), "--resume")
    assert "model.start_from" in message and door.sha256(trained / WEIGHTS) in message
    assert "model.start_from" in many_runs.refused(*settings(storage, "one", "null", 1), "--resume")


def test_its_adapter_is_evaluated_and_merged_as_any(storage, tmp_path):
    run = str(storage / "one")
    assert evaluate.main(["--adapter", run, "--num-prompts", "1"]) == 0
    merge = ["--to", "merged", "--output", str(tmp_path / "merged"), "--verify", "--num-rows", "2"]
    assert export.main(["--adapter", run, *merge]) == 0


def test_what_a_later_run_is_started_from_names_its_own_start(storage, trained):
    start = open_start(tiny_models.make_config("embedded", model={"start_from": str(storage / "one")}).model)
    lineage = start.lineage()
    assert lineage["run_name"] == "one" and lineage["start_from"]["path"] == str(trained)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_adapter_of_plain_peft_is_gone_on_from(family, tmp_path, process_group):
    base = tiny_models.save(family, tmp_path / "base")
    targets = {"gpt2": ["c_attn", "c_proj"], "qwen3_moe": ["q_proj", "o_proj"]}.get(family, "all-linear")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    peft = get_peft_model(model, config)
    peft.save_pretrained(tmp_path / "plain")
    asked = {"start_from": str(tmp_path / "plain"), "lora_r": 4, "lora_alpha": 8, "target_modules": targets}
    config = tiny_models.make_config(base, model=asked, quantization={"type": "none"})
    copy_weights(open_start(config.model), open_folder(str(tmp_path / "run")) / names.START_FROM)
    engine = engines.build(config, tmp_path)
    engine.train(False)
    assert tiny_models.difference(tiny_models.logits(engine.module), tiny_models.logits(peft)) < 1e-5


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"lora_r": 4}, ("model.lora_r=4", "with 8")),
        ({"lora_alpha": 5}, ("model.lora_alpha=5", "with 32")),
        ({"lora_variant": "dora"}, ("model.lora_variant=dora", "with lora")),
        ({"alpha_pattern": {"q_proj": 4}}, ("model.alpha_pattern", "q_proj", "{}")),
        ({"rank_pattern": {"q_proj": 4}}, ("model.rank_pattern", "q_proj", "4 x ")),
        ({"target_modules": ["q_proj"]}, ("model.target_modules=[q_proj]", "k_proj")),
        ({"modules_to_save": ["norm"]}, ("model.modules_to_save=[norm]", "norm")),
        ({"new_tokens": ["<tool>"]}, ("model.new_tokens", "2048")),
    ],
)
def test_other_shape_than_the_adapters_is_refused_with_both_values(model, told, trained, tmp_path):
    asked = {"lora_r": 8, "start_from": str(trained), **model}
    overrides = [f"model.{name}={json.dumps(value)}" for name, value in asked.items()] + ["deepspeed.zero_stage=2"]
    message = many_runs.refused(f"ray.storage_path={tmp_path}", "ray.num_workers=1", *overrides)
    assert all(part in message for part in (*told, str(trained)))


def test_adapter_of_another_base_is_refused(tmp_path, refused):
    made = adapters.trained(tmp_path / "a", tiny_models.save("llama", tmp_path / "base"), steps=1)
    more = ["ray.storage_path=" + str(tmp_path), "model.lora_r=8", f"model.start_from={made}"]
    message = refused(train, "-c", "configs/quickstart.yaml", *more)
    assert str(tmp_path / "base") in message and base_model_path("embedded") in message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_rslora": True, "use_dora": True}, "rslora with dora"),
    ],
)
def test_adapter_that_cannot_be_gone_on_from_is_refused(change, told, copied, tmp_path, refused):
    settings = copied / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **change}))
    more = ["model.lora_r=8", f"model.start_from={copied}", f"ray.storage_path={tmp_path}"]
    assert told in refused(train, "-c", "configs/quickstart.yaml", *more)


def test_start_that_is_not_there_is_refused(tmp_path, refused):
    more = [f"model.start_from={tmp_path}/none", f"ray.storage_path={tmp_path}"]
    assert "no such folder" in refused(train, "-c", "configs/quickstart.yaml", *more)
