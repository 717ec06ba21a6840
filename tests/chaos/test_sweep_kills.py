"""A sweep whose driver, trials, actors and workers are killed at random ends as the one that was left alone."""

import random
import signal
import time

import psutil
import pytest

from tests.integration import door, sweeps

SPACE = '{"training.learning_rate": {"grid": [0.003, 0.0003]}, "model.lora_r": {"grid": [4, 8]}}'
SETTINGS = (
    f"sweep.parameters={SPACE}", "sweep.search=grid", "sweep.num_trials=null", "sweep.scheduler=fifo",
    "training.max_steps=60", "ray.max_failures=9",
)  # fmt: skip
SEED = 1
TITLES = {"trial": "qlora_ray.train", "worker": "ray::RayTrainWorker", "actor": "ray::ResourceTrainable",
          "controller": "ray::TrainController"}  # fmt: skip


def victims(driver, title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_a_step(sweep, driver) -> None:
    """Until some trial has gone on since now."""

    def lines():
        return sum(len(door.metrics(run)) for run in (sweep / "trials").glob("t????"))

    before, deadline = lines(), time.monotonic() + 240
    while lines() <= before:
        before = min(before, lines())  # steps since the last checkpoint are done again
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_random_kills_change_nothing_in_the_ledgers_outcome(tmp_path):
    ended = sweeps.run(tmp_path, "whole", *SETTINGS, timeout=600)
    assert ended.returncode == 0, ended.stderr
    chance, killed, sweep = random.Random(SEED), [], tmp_path / "hurt"
    driver = sweeps.start(tmp_path, "hurt", *SETTINGS)
    ended_before: dict[str, float] = {}
    kinds = ["driver", *TITLES]
    chance.shuffle(kinds)
    while kinds:
        kind = kinds[-1]
        wait_for_a_step(sweep, driver)
        time.sleep(chance.uniform(0, 3))
        if kind != "driver":
            found = victims(driver, TITLES[kind])
            if not found:
                continue
            chance.choice(found).send_signal(signal.SIGKILL)
        else:
            driver.kill()
            driver.communicate(timeout=60)
            deadline = time.monotonic() + 60
            while sweeps.trial_processes(sweep):
                assert time.monotonic() < deadline, "a trial outlives its sweep"
                time.sleep(0.2)
            for event in sweeps.events(sweep, "end"):
                log = sweep / "trials" / f"{event['trial']}.log"
                assert ended_before.setdefault(event["trial"], log.stat().st_mtime) == log.stat().st_mtime, "rerun"
            driver = sweeps.start(tmp_path, "hurt", *SETTINGS, *["--resume"] * (sweep / "trials.jsonl").exists())
        killed.append(kinds.pop())
        assert driver.poll() is None or kind == "driver", driver.communicate()
    out, err = driver.communicate(timeout=900)
    assert driver.returncode == 0, out + err
    print(killed)
    assert sweeps.outcome(sweep) == sweeps.outcome(tmp_path / "whole")
    assert door.summary(sweep)["best"]["value"] == door.summary(tmp_path / "whole")["best"]["value"]
    for name in sweeps.outcome(sweep):
        path = f"trials/{name}/adapter/adapter_model.safetensors"
        assert door.sha256(sweep / path) == door.sha256(tmp_path / "whole" / path)
