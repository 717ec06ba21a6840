"""Workers come and go with their nodes: the same data order, the same global batch, and the same bits."""

import time

import pytest

from tests.chaos import nodes
from tests.integration import door, many_runs

STEPS = 150
FILES = ("adapter/adapter_model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors")


def settings(storage, name, *more):
    return [
        "-c", "configs/quickstart.yaml", f"ray.storage_path={storage}", f"ray.run_name={name}",
        "ray.num_workers=[1,2]", "training.batch_size=4", f"training.max_steps={STEPS}", "logging.every_steps=1",
        "checkpoint.every_steps=20", "training.eval_every_steps=80", "evaluation.num_prompts=0",
        "ray.elastic_resize_monitor_interval_s=3", *more,
    ]  # fmt: skip


def wait_for_workers(run, number: int, driver, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while [line["num_workers"] for line in door.metrics(run) if "num_workers" in line][-1:] != [number]:
        assert driver.poll() is None, f"ended early: {driver.communicate()}"
        assert time.monotonic() < deadline, f"not {number} workers in {timeout} s"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_one_two_one_workers_give_the_bits_of_a_fixed_number(tmp_path):
    ended = many_runs.run(*settings(tmp_path, "whole", "ray.num_workers=2"))
    assert ended.returncode == 0, ended.stderr
    whole, run = tmp_path / "whole", tmp_path / "elastic"
    with nodes.cluster(2) as cluster:
        driver = door.start(
            *settings(
                tmp_path,
                "elastic",
                f"ray.address={cluster.address}",
                "ray.allow_unauthenticated=true",
                f"ray.resources_per_worker={nodes.SLOT}",
            )
        )
        door.wait_for_step(run, 6, driver)
        cluster.remove_node(list(cluster.worker_nodes)[0], allow_graceful=False)  # killed, as a lost machine is
        wait_for_workers(run, 1, driver)
        added = nodes.add(cluster)
        wait_for_workers(run, 2, driver)
        nodes.drain(cluster, added, seconds=10)
        gone = time.monotonic() + 11
        wait_for_workers(run, 1, driver)
        time.sleep(max(0.0, gone - time.monotonic()))
        cluster.remove_node(added, allow_graceful=False)
        out, err = driver.communicate(timeout=150)
    assert driver.returncode == 0, out + err
    for file in FILES:
        assert door.sha256(run / file) == door.sha256(whole / file), file
    assert door.losses(run) == door.losses(whole)
    summary = door.summary(run)
    (lost,), (grown, drained) = summary["failures"], summary["interruptions"]
    assert lost["steps_redone"] <= 20
    assert "from 1 to 2 workers" in grown["cause"] and grown["steps_redone"] == 0
    assert "will be taken away" in drained["cause"] and drained["steps_redone"] <= 2


@pytest.mark.slow
def test_head_that_dies_and_comes_back_with_its_storage_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
    short = ("training.max_steps=40", "training.eval_every_steps=100")
    ended = many_runs.run(*settings(tmp_path, "whole", "ray.num_workers=2", *short))
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "headless"
    with nodes.cluster(2) as cluster:
        where = (
            f"ray.address={cluster.address}",
            "ray.allow_unauthenticated=true",
            f"ray.resources_per_worker={nodes.SLOT}",
        )
        driver = door.start(*settings(tmp_path, run.name, *short, *where))
        door.wait_for_step(run, 6, driver)
        cluster.head_node.kill_gcs_server()
        time.sleep(2)
        cluster.head_node.start_gcs_server()
        out, err = driver.communicate(timeout=150)
    assert driver.returncode == 0, out + err
    assert door.summary(run)["failures"] == []
    file = "adapter/adapter_model.safetensors"
    assert door.sha256(run / file) == door.sha256(tmp_path / "whole" / file)
