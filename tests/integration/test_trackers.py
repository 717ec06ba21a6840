"""Trackers get the metrics by their names, and whatever happens to one, the run does not notice."""

import importlib.util
import signal
import sqlite3
import sys
import time

import pytest

from qlora_ray.config import Config
from qlora_ray.driver import trackers
from qlora_ray.errors import ConfigError
from qlora_ray.planning.early import check_trackers

LINES = [{"step": step, "loss": 1 / step, "tokens_per_second": 10.0 * step} for step in range(1, 21)]
LINES.append({"step": 20, "eval_loss": 0.5})


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture
def tracked(tmp_path):
    """Sends LINES to a tracker and returns its run directory."""

    def send(name: str):
        run = tmp_path / "runs" / "one"
        sent = trackers.Trackers([name], str(run), Config().model_dump(mode="json"))
        for line in LINES:
            sent.log(line)
        sent.close()
        assert sent.take_failures() == []
        return run

    return send


@needs("tensorboard")
def test_tensorboard_gets_the_same_names_and_values(tracked):
    run = tracked("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "tokens_per_second", "eval_loss"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in LINES[:-1]
    ]


@needs("mlflow")
@pytest.mark.slow
def test_mlflow_gets_the_same_names_and_values(tracked, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tracked("mlflow")
    with sqlite3.connect(run.parent / "mlflow.db") as database:
        losses = database.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
        names = {name for (name,) in database.execute("select distinct key from metrics")}
        assert database.execute("select value from params where key = 'model.lora_r'").fetchone() == ("16",)
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in LINES[:-1]]
    assert names == {"loss", "tokens_per_second", "eval_loss"}


@needs("wandb")
@pytest.mark.slow
def test_wandb_offline_gets_the_same_names(tracked, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tracked("wandb")
    (written,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert all(name in content for name in (b"tokens_per_second", b"eval_loss", b"lora_r"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ValueError('no space left')", "no space left"),
        ("import os; os.abort()", "ended without a word"),
        ("import sys; [None for _ in sys.stdin]; sys.exit('upload failed')", "upload failed"),
        ("import time; time.sleep(60)", "did not finish in 0.5 s"),
    ],
)
def test_failing_tracker_is_said_once_and_costs_the_run_nothing(tmp_path, monkeypatch, code, said):
    started = trackers.subprocess.Popen
    monkeypatch.setattr(
        trackers.subprocess, "Popen", lambda command, **more: started([sys.executable, "-c", code], **more)
    )
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_SECONDS", 0.5)
    sent = trackers.Trackers(["wandb"], str(tmp_path), {})
    failures = []
    for line in LINES:
        sent.log(line)
        failures += sent.take_failures()
        time.sleep(0.01)
    sent.close()
    failures += sent.take_failures()
    assert len(failures) == 1 and said in failures[0] and "The run goes on without it" in failures[0]


def test_tracker_that_takes_nothing_does_not_block_the_run(tmp_path, monkeypatch):
    started, deaf = trackers.subprocess.Popen, []

    def start_deaf(command, **more):
        deaf.append(started([sys.executable, "-c", "import time; time.sleep(200)"], **more))
        return deaf[0]

    monkeypatch.setattr(trackers.subprocess, "Popen", start_deaf)
    sent = trackers.Trackers(["wandb"], str(tmp_path), {})
    for _ in range(20_000):  # far more than a pipe holds
        sent.log(LINES[0])
    assert deaf[0].returncode == -signal.SIGKILL  # given up, not waited for
    assert "does not take the metrics in time" in sent.take_failures()[0]
    sent.close()


def test_missing_package_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'pip install "qlora_ray\[wandb\]"'):
        check_trackers(Config.model_validate({"logging": {"trackers": ["wandb"]}}))
    check_trackers(Config())
