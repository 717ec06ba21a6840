"""A checkpoint is whole, or it is not there."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch

from qlora_ray.config import Config
from qlora_ray.errors import BrokenCheckpoint, Stop
from qlora_ray.rundir.checkpoints import newest_whole, verify, with_manifest
from qlora_ray.rundir.metrics import MetricsFile
from qlora_ray.storage import open_folder
from qlora_ray.worker.checkpoint import load_latest, save
from qlora_ray.worker.messages import Run
from qlora_ray.worker.saver import Saver
from qlora_ray.worker.state import MOMENTS, State
from tests import disks
from tests.chaos.killed_saves import state

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.fixture
def run(tmp_path):
    """A run directory with the checkpoints of steps 5 and 10."""
    folder = open_folder(str(tmp_path / "run"))
    for step in (5, 10):
        save(folder, state(step), {"step": step}, keep=3)
    return tmp_path / "run"


def test_saved_state_comes_back_bit_for_bit(run):
    resumed = load_latest(open_folder(str(run)), set_aside=False)
    loaded, wanted = resumed.adapter, state(10)
    assert resumed.progress == {"step": 10} and loaded.optimizer_step == 10
    assert loaded.weights.keys() == wanted.weights.keys()
    for name, weight in wanted.weights.items():
        assert torch.equal(loaded.weights[name], weight)
        assert all(torch.equal(loaded.moments[name][key], wanted.moments[name][key]) for key in MOMENTS)


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_bit_is_detected_and_the_checkpoint_before_is_used(run, file):
    path, chance = run / "checkpoints" / "step_00000010" / file, random.Random(file)
    whole = path.read_bytes()
    for _ in range(60):
        position, bit = chance.randrange(len(whole)), chance.randrange(8)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
        checkpoint, _, broken = newest_whole(open_folder(str(run)))
        assert (checkpoint.name, len(broken)) == ("step_00000005", 1), (position, bit)
    path.write_bytes(whole)
    assert newest_whole(open_folder(str(run)))[0].name == "step_00000010"


@pytest.mark.parametrize("file", FILES)
def test_any_truncated_file_is_detected_and_the_checkpoint_before_is_used(run, file):
    path, chance = run / "checkpoints" / "step_00000010" / file, random.Random(file)
    whole = path.read_bytes()
    for length in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(30))]:
        path.write_bytes(whole[:length])
        assert newest_whole(open_folder(str(run)))[0].name == "step_00000005", length
    path.unlink()
    assert newest_whole(open_folder(str(run)))[0].name == "step_00000005"


def test_resumed_state_is_that_of_the_checkpoint_before(run):
    (run / "checkpoints/step_00000010/optimizer.safetensors").write_bytes(b"")
    assert load_latest(open_folder(str(run)), set_aside=False).progress == {"step": 5}


def test_manifest_that_leaves_a_file_out_is_no_proof(run):
    path = run / "checkpoints/step_00000010/manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["optimizer.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpoint, match="does not list every file"):
        verify(open_folder(str(path.parent)))


def test_without_manifest_there_is_no_checkpoint(run):
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    assert with_manifest(open_folder(str(run))) == [] and newest_whole(open_folder(str(run))) is None


def test_directory_of_an_interrupted_write_is_not_a_checkpoint(run):
    shutil.copytree(run / "checkpoints/step_00000010", run / "checkpoints/.step_00000015.tmp")
    assert newest_whole(open_folder(str(run)))[0].name == "step_00000010"


def test_run_with_only_broken_checkpoints_says_so(run):
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(BrokenCheckpoint, match="state.json is not what was written.*No whole checkpoint is left"):
        newest_whole(open_folder(str(run)))


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 7, 10, 100])
def test_as_many_of_the_newest_are_kept_as_were_asked_for(run, keep):
    for step in range(15, 65, 5):
        save(open_folder(str(run)), state(step), {"step": step}, keep)
        kept = [f"step_{kept:08d}" for kept in range(5, step + 1, 5)][-keep:]
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept


def test_nothing_is_pickled(run):
    assert {path.name for path in run.rglob("*") if path.is_file()} == set(FILES)


@pytest.mark.parametrize("keep", [1, 2])
def test_save_killed_at_any_sync_or_rename_leaves_a_whole_checkpoint(tmp_path, keep):
    command = [sys.executable, "-m", "tests.chaos.killed_saves", str(tmp_path), str(keep)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)  # forks: a small process of its own
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 20


def test_broken_newer_checkpoint_is_put_aside_and_counts_for_nothing(run):
    (run / "checkpoints/step_00000010/state.json").write_text("{}")
    folder = open_folder(str(run))
    resumed = load_latest(folder, set_aside=True)
    assert resumed.progress == {"step": 5} and "state.json is not what was written" in resumed.broken[0]
    save(folder, state(7), {"step": 7}, keep=1)
    assert [checkpoint.name for checkpoint in with_manifest(folder)] == ["step_00000007"]
    assert (run / "checkpoints/broken-step_00000010").is_dir()
    save(folder, state(10), {"step": 10}, keep=1)
    resumed = load_latest(folder, set_aside=True)
    assert (resumed.progress, resumed.broken) == ({"step": 10}, [])


class OneWorker:
    """The team of a run with one worker."""

    rank = 0

    def gather(self, value):
        return [value]


@pytest.fixture
def small_disk(tmp_path):
    with disks.small_disk(tmp_path / "disk", "256k") as place:
        yield place


def test_full_disk_at_any_write_keeps_the_last_checkpoint_and_the_next_succeeds_once_there_is_space(small_disk):
    folder, ballast = open_folder(str(small_disk / "run")), small_disk / "ballast"
    saver = Saver(Run(Config.model_validate({"checkpoint": {"keep": 2}}), None, folder, folder, "", False), OneWorker())

    def problem_with(step: int) -> str | None:
        saver.save(State(step=step), lambda: state(step))
        try:
            return saver.finish()
        except Stop as stop:
            return str(stop)

    assert problem_with(5) is None
    free, failed = shutil.disk_usage(small_disk).free, 0
    for left in range(0, 40 * 1024, 4096):
        ballast.write_bytes(b"x" * (free - left))
        problem = problem_with(10)
        ballast.unlink()
        assert load_latest(folder, set_aside=True).progress["step"] == (5 if problem else 10)
        if not problem:
            break
        failed += 1
        assert "No space left on device" in problem
    assert not problem and failed > 3


def test_metrics_wait_for_space_and_are_then_complete(small_disk):
    folder, ballast = open_folder(str(small_disk / "run")).make(), small_disk / "ballast"
    writer = MetricsFile(folder, resume_step=0)
    for step in range(1, 200):
        if step == 20:
            ballast.write_bytes(b"x" * (shutil.disk_usage(small_disk).free))
        elif step == 150:
            ballast.unlink()
        writer.write(step=step, loss=1 / step, text="x" * 60)
    lines = [json.loads(line) for line in (small_disk / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 200))
