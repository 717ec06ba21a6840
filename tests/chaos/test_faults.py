"""Interrupt a run however you like: the same bits in the end, and the reason in the summary."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests import disks
from tests.chaos import nodes
from tests.integration import door, many_runs

STEPS = 30
FILES = ("adapter/adapter_model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors")


def settings(storage, name, *more):
    return [
        "-c", "configs/quickstart.yaml", f"ray.storage_path={storage}", f"ray.run_name={name}", "ray.num_workers=2",
        "training.batch_size=4", f"training.max_steps={STEPS}", "checkpoint.every_steps=5",
        "checkpoint.keep=2", "training.eval_every_steps=10", "evaluation.num_prompts=0", "ray.max_failures=9",
        "watchdog.min_seconds=8", "watchdog.frozen_seconds=10", *more,
    ]  # fmt: skip


def process_of(driver: subprocess.Popen, title: str) -> psutil.Process:
    """The newest of a run's Ray processes with this title."""
    found = [p for p in psutil.Process(driver.pid).children(recursive=True) if title in "".join(p.cmdline())]
    return max(found, key=lambda p: p.create_time())


def with_fault(fault: str, marker: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "inject"), prepend=os.pathsep)
    monkeypatch.setenv("QLORA_RAY_FAULT", fault)
    monkeypatch.setenv("QLORA_RAY_FAULT_MARKER", str(marker))


def assert_same_bits(run, whole):
    for file in FILES:
        assert door.sha256(run / file) == door.sha256(whole / file), file
    assert door.told(run) == door.told(whole)
    counts = ("steps", "num_tokens", "num_label_tokens", "first_loss", "last_loss", "best_eval_loss")
    assert [door.summary(run)[name] for name in counts] == [door.summary(whole)[name] for name in counts]


def test_run_that_loses_workers_and_patience_ends_with_the_bits_of_one_that_did_not(
    whole, storage, tmp_path, monkeypatch
):
    with_fault("sleep:1:22", tmp_path / "marker", monkeypatch)
    run = storage / "hurt"
    driver = door.start(*settings(storage, "hurt"))
    for step, title, how in [
        (3, "ray::RayTrainWorker", signal.SIGKILL),
        (13, "ray::RayTrainWorker", signal.SIGSTOP),
    ]:
        door.wait_for_step(run, step, driver)
        process_of(driver, title).send_signal(how)
    out, err = driver.communicate(timeout=400)
    assert driver.returncode == 0, out + err
    assert_same_bits(run, whole)
    failures = door.summary(run)["failures"]
    causes = [failure["cause"] for failure in failures]
    assert "died" in causes[0] and ("stuck" in causes[1] or "froze" in causes[1]), causes
    assert causes[2] == "stuck: worker 0, worker 1; stacks in logs/"
    assert all(failure["steps_redone"] <= 5 for failure in failures)
    stacks = (run / "logs" / "worker_1.log").read_text()
    assert "sitecustomize.py" in stacks and "in misbehave" in stacks
    assert "raylet" not in out + err and "Traceback" not in out + err


@pytest.mark.slow
def test_run_whose_controller_on_a_cluster_dies_ends_with_the_bits_of_one_that_was_left_alone(whole, storage):
    run = storage / "headless"
    with nodes.cluster(2) as cluster:
        where = (f"ray.address={cluster.address}", "ray.allow_unauthenticated=true",
                 f"ray.resources_per_worker={nodes.SLOT}")  # fmt: skip
        driver = door.start(*settings(storage, run.name, *where))
        door.wait_for_step(run, 8, driver)
        raylets = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in cluster.list_all_nodes()]
        tree = [process for raylet in raylets for process in raylet.children(recursive=True)]
        next(one for one in tree if "ray::TrainController" in "".join(one.cmdline())).kill()
        out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    assert_same_bits(run, whole)
    (failure,) = door.summary(run)["failures"]
    assert "controller died" in failure["cause"] and failure["steps_redone"] <= 5


@pytest.mark.slow
def test_failure_that_repeats_without_progress_ends_the_run_after_three_tries_with_its_cause(
    storage, tmp_path, monkeypatch
):
    with_fault("raise:1:2:always", tmp_path / "marker", monkeypatch)
    ended = door.run(*settings(storage, "again"))
    summary = door.summary(storage / "again")
    assert (ended.returncode, summary["status"], len(summary["failures"])) == (1, "failed", 3)
    assert "ValueError: made to fail" in summary["reason"] and "without progress" in summary["reason"]
    assert summary["reason"] in ended.stderr


@pytest.mark.slow
def test_out_of_memory_on_one_worker_ends_the_run_at_once_and_names_the_levers(storage, tmp_path, monkeypatch):
    with_fault("oom:1:2:always", tmp_path / "marker", monkeypatch)
    ended = door.run(*settings(storage, "oom"))
    assert ended.returncode == 1 and len(door.summary(storage / "oom")["failures"]) == 1
    assert "worker 1 is out of memory" in ended.stderr and "training.batch_size=2" in ended.stderr


@pytest.mark.parametrize(
    "kind, code, status, words",
    [
        ("guard", 1, "failed", "worker 1: made to find that the weights are wrong"),
        pytest.param(
            "refuse", 2, "refused", "model.base_model: made to be missing on one node", marks=pytest.mark.slow
        ),
    ],
)
def test_what_one_worker_finds_ends_all_at_once_with_its_words(
    storage, tmp_path, monkeypatch, kind, code, status, words
):
    with_fault(f"{kind}:1:2:always", tmp_path / "marker", monkeypatch)
    ended = door.run(*settings(storage, kind, "watchdog.min_seconds=1000", "watchdog.step_seconds=1000"))
    summary = door.summary(storage / kind)
    assert (ended.returncode, summary["status"], summary["reason"]) == (code, status, words)
    assert ended.stderr.count(words) == 1 and "Traceback" not in ended.stderr + ended.stdout
    assert len(summary["failures"]) <= 1 and "going back to the last checkpoint" not in ended.stdout


@pytest.mark.slow
def test_worker_that_skips_a_collective_is_found_out(whole, storage, tmp_path, monkeypatch):
    with_fault("skip:1:7", tmp_path / "marker", monkeypatch)
    ended = door.run(*settings(storage, "skip"))
    assert ended.returncode == 0, ended.stderr
    assert_same_bits(storage / "skip", whole)
    assert len(door.summary(storage / "skip")["failures"]) == 1


def said_until(driver: subprocess.Popen, words: str) -> str:
    """What a run has said up to these words, or to its end."""
    said = ""
    while words not in said and (line := driver.stdout.readline()):
        said += line
    return said


@pytest.mark.slow
@pytest.mark.parametrize("room_returns", [True, False])
def test_disk_that_is_full_costs_checkpoints_and_no_bit(whole, tmp_path, room_returns):
    with disks.small_disk(tmp_path / "disk", "48m") as disk:
        run, ballast, asked = disk / "full", disk / "ballast", settings(disk, "full", "evaluation.num_prompts=2")
        driver = door.start(*asked)
        while not (run / "checkpoints" / "step_00000005" / "manifest.json").exists():
            assert driver.poll() is None, f"ended early: {driver.communicate()}"
            time.sleep(0.05)
        disks.fill(ballast)
        out = said_until(driver, "the next one is due as planned")  # of a checkpoint
        if room_returns:
            ballast.unlink()
        out, err = out + driver.stdout.read(), driver.stderr.read()
        driver.wait()
        assert "could not be written" in out and "Traceback" not in out + err
        assert (run / "checkpoints" / "step_00000005" / "manifest.json").exists() or room_returns
        if not room_returns:
            assert driver.returncode == 1
            assert "No space left on device, 3x in a row. Free space there; --resume goes on." in err
            ballast.unlink()
            ended = many_runs.run(*asked, "--resume")
            assert ended.returncode == 0, ended.stderr
        else:
            assert driver.returncode == 0, out + err
        assert_same_bits(run, whole)
        assert door.summary(run)["failures"] == []
        answered = [json.loads(line)["step"] for line in (run / "samples_by_step.jsonl").read_text().splitlines()]
        assert sorted(set(answered)) == [10, 20, 30]


def test_run_whose_packed_weights_would_be_cast_stops_before_its_first_step(storage, tmp_path, monkeypatch):
    with_fault("cast:0:0", tmp_path / "marker", monkeypatch)
    ended = door.run(*settings(storage, "cast", "quantization.compute_dtype=bfloat16"))
    assert ended.returncode == 1
    assert "is not what the base's files give" in ended.stderr and "(bnb_4bit_quant_storage" in ended.stderr
    assert door.summary(storage / "cast")["status"] == "failed" and door.losses(storage / "cast") == {}


@pytest.mark.slow
def test_step_whose_gradient_is_not_finite_is_skipped_and_told_with_its_samples(storage, tmp_path, monkeypatch):
    with_fault("nan:1:7:always", tmp_path / "marker", monkeypatch)
    run = storage / "nan"
    ended = door.run(*settings(storage, "nan", "checkpoint.every_steps=1", "checkpoint.keep=100"))
    assert ended.returncode == 0, ended.stderr
    before, after = (run / "checkpoints" / f"step_{step:08d}" for step in (7, 8))
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert door.sha256(before / file) == door.sha256(after / file)
    (skipped,) = [line for line in door.metrics(run) if line.get("skipped")]
    assert skipped["step"] == 8 and len(skipped["samples"]) >= 8
    assert "Step 8 was skipped: its gradient is not finite. Samples " in ended.stdout
    assert door.summary(run)["num_skipped_steps"] == 1
    assert 8 not in door.losses(run) and len(door.losses(run)) == STEPS - 1


@pytest.mark.slow
def test_run_whose_gradients_stay_not_finite_stops_with_its_last_good_checkpoint(storage, tmp_path, monkeypatch):
    with_fault("nan:0:12-29:always", tmp_path / "marker", monkeypatch)
    run = storage / "nans"
    ended = door.run(*settings(storage, "nans"))
    assert ended.returncode == 1
    assert "5 steps in a row, up to step 17, are not finite" in ended.stderr
    assert door.summary(run)["failures"] == []
    newest = max((run / "checkpoints").glob("step_*"))
    weights = load_file(newest / "adapter.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
