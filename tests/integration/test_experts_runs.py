"""Runs of mixtures through the doors: what is done with their adapters, and one sha256 however they were trained."""

import json
import os
import shutil
import signal

import pytest
import yaml
from transformers import AutoModelForCausalLM

from qlora_ray import evaluate, export, generate, plan
from tests.integration import door, many_runs, tiny_models
from tests.integration.test_short_runs import Case, bits, config_of

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny mixture, and of runs of it."""
    return tmp_path_factory.mktemp("mixture")


def settings(folder, storage: str) -> list[str]:
    return [
        "-c", "configs/quickstart.yaml", f"model.base_model={folder / 'base'}", "model.expert_lora=true",
        f"ray.storage_path={folder / storage}", "ray.run_name=run", f"training.max_steps={STEPS}",
        "training.batch_size=1", "training.global_batch_size=2", "logging.every_steps=1", "checkpoint.every_steps=1",
        "checkpoint.keep=3", "evaluation.num_prompts=0", "training.router_aux_loss_coef=0.01", "model.lora_dropout=0",
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread_each():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def run(folder):
    """Trained by one worker."""
    tiny_models.save("qwen3_moe", folder / "base")
    ended = many_runs.run(*settings(folder, "one"), "ray.num_workers=1")
    assert ended.returncode == 0, ended.stderr
    return folder / "one" / "run"


@pytest.mark.timeout(600)
def test_a_mixture_with_adapted_experts_goes_through_the_doors(run, folder, tmp_path, capsys):
    shares = [line["busiest_expert_share"] for line in door.metrics(run) if "loss" in line]
    assert len(shares) == STEPS and all(2 / 4 <= share <= 1 for share in shares)
    assert plan.main([*settings(folder, "one"), "ray.num_workers=1"]) == 0
    assert "experts stay" not in capsys.readouterr().out
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"instruction": "Say yes.", "input": "", "output": "yes"}) + "\n")
    assert generate.main(["--adapter", str(run), "--prompt", "Say yes.", "max_new_tokens=4"]) == 0
    assert evaluate.main(["--adapter", str(run), "--file", str(records), "max_new_tokens=4"]) == 0
    merged = ["--adapter", str(run), "--to", "merged", "--output", str(tmp_path / "merged"), "--verify"]
    assert export.main([*merged, "--dtype", "float32"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.timeout(600)
def test_steps_of_a_mixture_that_two_workers_take_after_one_have_its_bits(run, folder):
    again = folder / "two" / "run"
    shutil.copytree(run.parent, again.parent)
    for step in range(2, STEPS + 1):
        shutil.rmtree(again / "checkpoints" / f"step_{step:08d}")
    ended = many_runs.run(*settings(folder, "two"), "ray.num_workers=2", "--resume")
    assert ended.returncode == 0, ended.stderr
    assert bits(again, STEPS) == bits(run, STEPS)
    assert door.losses(again) == door.losses(run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mixture_has_one_sha256_on_1_2_and_4_workers_at_stages_0_and_3_and_after_a_sigkill(tmp_path):
    base = tiny_models.save("qwen3_moe", tmp_path / "qwen3_moe")
    cases = [Case(5, stage, True, steps=8, base=base, expert_lora=True, batch_size=1) for stage in (0, 3)]
    made = [config_of(case, tmp_path, workers) for workers in (1, 2, 4) for case in cases]
    asked_for = [config.model_dump(mode="json") for config in made]
    for values in asked_for[-2:]:
        values["ray"]["resources_per_worker"] = {"CPU": 0.1}  # four workers, on any machine
    many_runs.train(asked_for)
    ended = {tmp_path / f"workers{workers}" / case.name for workers in (1, 2, 4) for case in cases}
    asked, again = tmp_path / "asked.yaml", tmp_path / "workers2" / "killed"
    asked.write_text(yaml.safe_dump(config_of(cases[1], tmp_path, 2).model_dump(mode="json")))
    killed = door.start("-c", str(asked), "ray.run_name=killed")
    door.wait_for_step(again, 2, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert 2 <= max(door.losses(again)) < cases[1].steps
    resumed = many_runs.run("-c", str(asked), "ray.run_name=killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert len({bits(run, cases[1].steps) for run in (*ended, again)}) == 1
