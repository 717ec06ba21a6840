"""A trial's process does not outlive whoever started it, and one trial has one process."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qlora_ray.sweep import process
from tests.unit.test_sweep_exploit import checkpoint


def wait_until(happened, seconds=100):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start_parent(tmp_path):
    """A process that starts a trial's process, which waits for its config for ever; returns both."""
    config, lock = tmp_path / "config.yaml", tmp_path / "lock"
    os.mkfifo(config)
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'qlora_ray.sweep.child', str(os.getpid()), "
        f"{str(lock)!r}, '-c', {str(config)!r}], start_new_session=True)\n"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    wait_until(lambda: lock.exists() and not is_free(lock))
    return parent, child, lock


def is_free(lock) -> bool:
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False


def test_trial_dies_with_its_parent_however_that_ends(tmp_path):
    parent, child, lock = start_parent(tmp_path)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert is_free(lock)  # for the process that goes on with the trial


def test_trial_whose_parent_is_gone_already_does_not_start(tmp_path):
    command = [sys.executable, "-m", "qlora_ray.sweep.child", "999999999", str(tmp_path / "lock")]
    assert subprocess.run(command, timeout=200).returncode == 1
    assert not (tmp_path / "lock").exists()


class Ended:
    """A process that was killed as soon as it started."""

    started: list[list[str]] = []

    def __init__(self, command, **options):
        self.started.append(command)

    def poll(self):
        return -signal.SIGKILL


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """A trial whose every process is killed; its start has just been."""
    monkeypatch.setattr(process.subprocess, "Popen", Ended)
    monkeypatch.setattr(Ended, "started", [])
    trial = process.TrialProcess(tmp_path, "t0000", {"training": {}}, None)
    trial.start()
    return trial


def test_killed_trial_is_started_again_until_that_is_no_use(killed, tmp_path):
    for _ in range(process.MAX_DEATHS):
        assert killed.exit_code() is None
    assert killed.exit_code() == -signal.SIGKILL and len(Ended.started) == 1 + process.MAX_DEATHS
    assert "killed by signal 9" in killed.why_it_failed(-signal.SIGKILL)


def test_new_checkpoint_between_deaths_is_progress_and_is_gone_on_from(killed, tmp_path):
    for step in range(10, 10 * process.MAX_DEATHS + 50, 10):
        checkpoint(tmp_path / "t0000", step, "x")
        assert killed.exit_code() is None and Ended.started[-1][-1] == "--resume"


def test_trial_killed_before_its_first_checkpoint_begins_anew(killed, tmp_path):
    (tmp_path / "t0000" / "checkpoints").mkdir(parents=True)
    assert killed.exit_code() is None
    assert not (tmp_path / "t0000").exists() and "--resume" not in Ended.started[-1]


def test_reason_of_a_failed_trial_is_its_summarys_or_its_last_words(killed, tmp_path):
    log = tmp_path / "t0000.log"
    log.write_text("step 1\nerror: the run failed: boom\nLogs: somewhere\n")
    assert killed.why_it_failed(1) == "the run failed: boom"
    (tmp_path / "t0000").mkdir()
    (tmp_path / "t0000" / "summary.json").write_text('{"reason": "out of memory\\ndetails"}')
    assert killed.why_it_failed(1) == "out of memory"
    log.write_text("error: model.lora_r=0: too small\n")
    assert killed.why_it_failed(2) == "model.lora_r=0: too small"


def test_half_written_line_of_metrics_waits_for_its_end(killed, tmp_path):
    (tmp_path / "t0000").mkdir()
    path = tmp_path / "t0000" / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert killed.lines() == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "loss": 1.0}\n')
    assert killed.lines()[-1] == {"step": 2, "loss": 1.0}
