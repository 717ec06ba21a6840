"""Whole sweeps through the door: real Ray Tune, each trial a real run, on CPU."""

import json
import signal
import tempfile
import time
from pathlib import Path

import pytest

from qlora_ray.model.record import FILE
from tests import disks
from tests.integration import door, sweeps

RATES = '{"training.learning_rate": {"grid": [0.003, 1.0e+30]}}'


@pytest.mark.slow
def test_sweep_ends_with_the_best_adapter_and_one_trial_that_failed_on_its_own(tmp_path):
    temporary = Path(tempfile.gettempdir())  # where Ray Tune's own files are until its end
    before = set(temporary.glob("qlora_ray_sweep_*"))
    ended = sweeps.run(
        tmp_path, "grid", f"sweep.parameters={RATES}", "sweep.search=grid", "sweep.num_trials=null",
        "sweep.scheduler=fifo", "training.max_steps=10", "training.warmup_ratio=0", "training.lr_schedule=constant",
    )  # fmt: skip
    sweep = tmp_path / "grid"
    assert ended.returncode == 0, ended.stderr
    outcome = sweeps.outcome(sweep)
    assert {name: status for name, (_, status, _) in outcome.items()} == {"t0000": "done", "t0001": "failed"}
    assert list(outcome["t0000"][2]) == [5, 10]
    (failed,) = [event for event in sweeps.events(sweep, "end") if event["status"] == "failed"]
    assert "not finite" in failed["reason"] and failed["reason"] in json.dumps(door.summary(sweep)["failed"])
    best = door.summary(sweep)["best"]
    assert best["trial"] == "t0000" and best["value"] == min(outcome["t0000"][2].values())
    for file in ("adapter_model.safetensors", FILE):
        assert door.sha256(sweep / "adapter" / file) == door.sha256(sweep / "trials/t0000/adapter_best" / file)
    assert "learning_rate: 0.003" in (sweep / "adapter" / "train_config.yaml").read_text()
    page = (sweep / "sweep.html").read_text()
    assert "http-equiv" in page and "not finite" in page and 'src="http' not in page
    assert len(list((tmp_path / "cache").glob("*/stats.json"))) == 1  # tokenized once for all trials
    assert not [path for path in sweep.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]
    assert set(temporary.glob("qlora_ray_sweep_*")) == before and sweeps.trial_processes(sweep) == []
    assert "Traceback" not in ended.stdout + ended.stderr and "raylet" not in ended.stdout + ended.stderr


@pytest.mark.slow
def test_sweep_by_margins_ends_with_the_adapter_that_tells_pairs_apart_best(tmp_path):
    metric = "eval_rewards/margins"
    ended = sweeps.run(
        tmp_path, "margins", "-c", "configs/dpo.yaml", f"sweep.parameters={RATES.replace('1.0e+30', '0.0001')}",
        "sweep.search=grid", f"sweep.metric={metric}", f"training.metric_for_best_model={metric}",
        "training.max_steps=10", "ray.num_workers=1",
    )  # fmt: skip
    sweep = tmp_path / "margins"
    assert ended.returncode == 0, ended.stderr
    reports = {event["trial"]: event[metric] for event in sweeps.events(sweep, "report")}  # the last of each
    best = door.summary(sweep)["best"]
    assert best["trial"] == "t0000" and best["value"] == max(reports.values()) > 2 * reports["t0001"]
    adapters = (sweep / "adapter", sweep / "trials/t0000/adapter_best")
    assert len({door.sha256(folder / "adapter_model.safetensors") for folder in adapters}) == 1
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 1  # once for all trials


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("left", [0, 32 * 2**20])  # no room to begin with, or for a part of a checkpoint
def test_sweep_whose_disk_is_full_fails_no_trial_and_goes_on_once_there_is_space(tmp_path, left):
    asked = ('sweep.parameters={"training.learning_rate": {"grid": [0.003, 0.001]}}', "sweep.search=grid",
             "sweep.num_trials=null", "sweep.scheduler=fifo", "training.max_steps=40", "model.lora_r=256")  # fmt: skip
    with disks.small_disk(tmp_path / "disk", "900m") as disk:  # a checkpoint takes 55 MiB
        sweep, ballast = disk / "full", disk / "ballast"
        driver = sweeps.start(disk, sweep.name, *asked)
        sweeps.wait_for_checkpoints(sweep, 2, driver)
        disks.fill(ballast, left)
        out, err = driver.communicate(timeout=200)
        # Whether a trial's write or the look before it comes first depends on what the other trial is writing.
        why = ("MiB are free at",) if left == 0 else ("MiB are free at", "No space left on device")
        assert driver.returncode == 1 and any(words in err for words in why)
        assert "Free space there; --resume goes on." in err
        assert "Traceback" not in out + err and sweeps.trial_processes(sweep) == []
        ballast.unlink()
        ended = sweeps.run(disk, sweep.name, *asked, "--resume")
        assert ended.returncode == 0, ended.stderr
        for _, status, reports in sweeps.outcome(sweep).values():
            assert status == "done" and list(reports) == list(range(5, 41, 5))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pbt_goes_on_from_the_weights_of_the_better_trial(tmp_path):
    rates = '{"training.learning_rate": {"loguniform": [1.0e-7, 0.003]}}'
    ended = sweeps.run(
        tmp_path, "pbt", f"sweep.parameters={rates}", "sweep.num_trials=2", "sweep.seed=15",
        "sweep.scheduler=pbt", "sweep.pbt.quantile_fraction=0.5", "sweep.pbt.resample_probability=0",
        "training.max_steps=40", "training.eval_every_steps=10", "checkpoint.every_steps=10", "checkpoint.keep=9",
        timeout=550,
    )  # fmt: skip
    sweep = tmp_path / "pbt"
    assert ended.returncode == 0, ended.stderr
    exploits = sweeps.events(sweep, "exploit")
    assert exploits
    first = next(event for event in exploits if event["trial"] == "t0001")
    assert first["donor"] == "t0000"
    # The donor's own checkpoint still lies in its run directory.
    donor = sweep / "trials" / "t0000" / "checkpoints" / f"step_{first['step']:08d}"
    assert (
        first["sha256"] == {name: door.sha256(donor / name) for name in first["sha256"]} and len(first["sha256"]) == 3
    )
    good, bad = (event["parameters"]["training.learning_rate"] for event in sweeps.events(sweep, "trial"))
    assert good > 1e-3 and bad < 1e-6
    assert first["parameters"]["training.learning_rate"] / good in (pytest.approx(0.8), pytest.approx(1.2))
    _, status, losses = sweeps.outcome(sweep)["t0001"]
    assert status == "done"
    after = [loss for step, loss in losses.items() if step > first["step"]]
    before = [loss for step, loss in losses.items() if step <= first["step"]]
    assert max(after) < 0.5 * min(before)  # from hardly trained weights to the donor's
    config = (sweep / "trials" / "t0001" / "config.yaml").read_text()
    last = [event for event in exploits if event["trial"] == "t0001"][-1]
    assert f"learning_rate: {last['parameters']['training.learning_rate']}" in config


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_leaves_checkpoints_and_resume_goes_on_where_it_was(tmp_path):
    rates = '{"training.learning_rate": {"grid": [0.003, 0.001]}}'
    settings = (f"sweep.parameters={rates}", "sweep.search=grid", "sweep.num_trials=null", "sweep.scheduler=fifo",
                "training.max_steps=40")  # fmt: skip
    sweep = tmp_path / "stopped"
    process = sweeps.start(tmp_path, "stopped", *settings)
    deadline = time.monotonic() + 200
    while len(sweeps.events(sweep, "report")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 130, out + err
    assert sweeps.events(sweep, "end") == [] and door.summary(sweep)["status"] == "interrupted"
    assert sweeps.trial_processes(sweep) == []
    (first, *_) = sweeps.events(sweep, "report")
    assert door.summary(sweep / "trials" / first["trial"])["status"] == "interrupted"
    ended = sweeps.run(tmp_path, "stopped", *settings, "--resume")
    assert ended.returncode == 0, ended.stderr
    outcome = sweeps.outcome(sweep)
    assert [status for _, status, _ in outcome.values()] == ["done", "done"]
    assert all(list(reports) == list(range(5, 45, 5)) for _, _, reports in outcome.values())
    again = sweeps.run(tmp_path, "stopped", *settings, "--resume")  # nothing is left to do
    assert again.returncode == 0 and sweeps.outcome(sweep) == outcome and "started" not in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_token_budget_and_too_many_failures_end_a_sweep(tmp_path):
    rates = '{"training.learning_rate": {"grid": [1.0e+30, 2.0e+30, 3.0e+30]}}'
    settings = ("sweep.search=grid", "sweep.num_trials=null", "sweep.scheduler=fifo", "training.warmup_ratio=0")
    ended = sweeps.run(tmp_path, "failing", f"sweep.parameters={rates}", *settings, "training.max_steps=10",
                       "sweep.max_failed_trials=1")  # fmt: skip
    assert ended.returncode == 1 and "more than sweep.max_failed_trials=1; t000" in ended.stderr
    rates = '{"training.learning_rate": {"grid": [0.003]}}'
    ended = sweeps.run(tmp_path, "budget", f"sweep.parameters={rates}", *settings, "training.max_steps=500",
                       "sweep.token_budget=5000")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    summary = door.summary(tmp_path / "budget")
    assert "token_budget=5000 is used up" in summary["reason"] and 5000 <= summary["tokens"] < 40000
    assert summary["adapter"] and summary["trials"] == {"unfinished": 1}
