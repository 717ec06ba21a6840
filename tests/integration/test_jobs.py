"""`ray job submit` on two nodes with token authentication: the same bits though a node dies; stopped, it goes on."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.integration import door, many_runs, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 30
SECRETS = {
    "HF_TOKEN": "hf_canaryCANARYcanary0123456789",
    "WANDB_API_KEY": "canary0wandb0canary0wandb0canary0wandb0a",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/secret/canary/aws/secret",
    "HTTPS_PROXY": "http://someone:canary-proxy-password@127.0.0.1:9",
}
FILES = ("adapter/adapter_model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors")


def settings(storage, name):
    return [
        "-c", "configs/quickstart.yaml", f"ray.storage_path={storage}", f"ray.run_name={name}", "ray.num_workers=2",
        f"training.max_steps={STEPS}", "logging.every_steps=1", "checkpoint.every_steps=5",
        "training.eval_every_steps=10", "evaluation.num_prompts=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def whole(storage):
    """The undisturbed run, on a private Ray."""
    ended = many_runs.run(*settings(storage, "whole"))
    assert ended.returncode == 0, ended.stderr
    return storage / "whole"


@pytest.fixture(scope="module")
def nodes(whole):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    made = ray_nodes.Nodes({**environment, **SECRETS, "RAY_JOB_STOP_WAIT_TIME_S": "60"})
    yield made
    made.close()


def submit(nodes, storage, name, *more):
    """The command of the README, with one worker a node: 2 of a node's 3 CPUs. Relative paths count from home."""
    storage = os.path.relpath(storage, Path.home())
    return nodes.start(
        "ray", "job", "submit", "--working-dir", ".", "--submission-id", f"{name}{len(more)}", "--",
        "python", "-m", "qlora_ray.train", *settings(storage, name), "ray.resources_per_worker={CPU: 2}", *more,
    )  # fmt: skip


def assert_same_bits(run, whole):
    for file in FILES:
        assert door.sha256(run / file) == door.sha256(whole / file), file


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="needs the right to mount",
)
def test_storage_that_a_node_does_not_see_is_refused_before_the_model_loads(nodes, storage):
    blind = nodes.add(hides=storage)
    job = submit(nodes, storage, "unshared")
    said, _ = job.communicate(timeout=120)
    nodes.kill(blind)
    assert job.returncode != 0
    assert "does not see what the driver wrote to ray.storage_path. Use a folder that all nodes share" in said, said
    assert not (storage / "unshared" / "logs" / "worker_0.log").exists()


def test_job_whose_second_node_is_killed_and_replaced_gives_the_bits_of_the_undisturbed_run(nodes, storage, whole):
    second = nodes.add()
    job = submit(nodes, storage, "hurt")
    door.wait_for_step(storage / "hurt", 8, job)
    nodes.kill(second)
    nodes.add()
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert_same_bits(storage / "hurt", whole)
    assert len(door.summary(storage / "hurt")["failures"]) >= 1
    assert "going back to the last checkpoint" in said and re.search(r"step \d+/30  loss", said)  # streamed logs


def test_stopped_job_leaves_a_checkpoint_and_the_same_command_with_resume_goes_on(nodes, storage, whole):
    job = submit(nodes, storage, "stopped")
    door.wait_for_step(storage / "stopped", 7, job)
    nodes.run("ray", "job", "stop", "stopped0", timeout=90)
    job.communicate(timeout=60)
    stopped_at = door.summary(storage / "stopped")["steps"]
    assert 7 <= stopped_at < STEPS
    assert (storage / "stopped" / "checkpoints" / f"step_{stopped_at:08d}" / "manifest.json").exists()
    said, _ = (again := submit(nodes, storage, "stopped", "--resume")).communicate(timeout=240)
    assert again.returncode == 0, said
    assert_same_bits(storage / "stopped", whole)


def test_sweep_as_a_job_ends_with_the_best_adapter(nodes, storage):
    job = nodes.start(
        "ray", "job", "submit", "--working-dir", ".", "--",
        "python", "-m", "qlora_ray.tune", "-c", "configs/sweep.yaml",
        f"ray.storage_path={storage}", "ray.run_name=sweep", "training.max_steps=4", "training.eval_every_steps=2",
        "evaluation.num_prompts=0", "checkpoint.every_steps=2", "sweep.num_trials=2", "sweep.scheduler=fifo",
    )  # fmt: skip
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert "2 done" in said
    ended = json.loads((storage / "sweep" / "summary.json").read_text())
    best = storage / "sweep" / "trials" / ended["best"]["trial"] / "adapter_best" / "adapter_model.safetensors"
    assert door.sha256(storage / "sweep" / "adapter" / "adapter_model.safetensors") == door.sha256(best)


def test_no_secret_of_user_or_nodes_is_in_anything_a_job_leaves(nodes, storage):
    """Not in the run's folder, Ray's session logs, the job's metadata or what was said."""
    secrets = [*SECRETS.values(), nodes.token_file.read_text()]
    found = [
        str(path)
        for root in (storage, nodes.folder)
        for path in root.rglob("*")
        if path.is_file() and path != nodes.token_file and any(one.encode() in path.read_bytes() for one in secrets)
    ]
    assert found == []
    jobs = nodes.run("ray", "list", "jobs", "--detail", "--format", "json").stdout
    logs = nodes.run("ray", "job", "logs", "hurt0").stdout
    assert json.loads(jobs) and "loss" in logs
    assert not [one for one in secrets if one in jobs or one in logs]
