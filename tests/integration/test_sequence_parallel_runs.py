"""A run whose two workers share each row, through the door: one is killed, and later rows are whole again."""

import os
import signal

import psutil
import pytest

from tests.integration import door, many_runs

STEPS = 6


def settings(storage, name, *more):
    return [
        "-c", "configs/quickstart.yaml", f"ray.storage_path={storage}", f"ray.run_name={name}", "ray.num_workers=2",
        "training.sequence_parallel=2", "training.batch_size=2", f"training.max_steps={STEPS}", "training.seed=3",
        "logging.every_steps=1", "checkpoint.every_steps=2", "training.eval_every_steps=3", "model.lora_dropout=0.1",
        "evaluation.num_prompts=1", "evaluation.max_new_tokens=4", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_resumed_run_has_the_bits_of_one_that_was_not_and_goes_on_with_whole_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ended = many_runs.run(*settings(tmp_path, "whole"))
    assert ended.returncode == 0, ended.stderr
    assert "2 workers hold each row" in " ".join(ended.stdout.split())
    killed = door.start(*settings(tmp_path, "killed"))
    door.wait_for_step(tmp_path / "killed", 3, killed)
    workers = [
        one
        for one in psutil.Process(killed.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(one.cmdline())
    ]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    out, err = killed.communicate(timeout=200)
    assert killed.returncode == 0, out + err
    assert len(door.summary(tmp_path / "killed")["failures"]) == 1
    whole, again = (tmp_path / name for name in ("whole", "killed"))
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors"):
        assert door.sha256(again / file) == door.sha256(whole / file), file
    assert door.told(again)[-1] == door.told(whole)[-1]

    more = ("training.sequence_parallel=1", "ray.num_workers=1", f"training.max_steps={STEPS + 2}")
    alone = many_runs.run(*settings(tmp_path, "killed", *more), "--resume")
    assert alone.returncode == 0, alone.stderr
    told = " ".join((alone.stdout + alone.stderr).split())
    assert "training.sequence_parallel 2 -> 1" in told and "the last bits are not those of the number before" in told
    assert max(door.losses(again)) == STEPS + 2
