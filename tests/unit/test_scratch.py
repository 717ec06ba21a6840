"""A temporary folder does not outlive its process for long, however that ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_ray.cluster.scratch import BEGUN_SECONDS, scratch

HOLD = """
import sys
from qlora_ray.cluster.scratch import scratch
with scratch("of_a_test_") as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def held() -> tuple[subprocess.Popen, Path]:
    """A process that has a folder, made a while ago."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "file").touch()
    age(folder)
    return process, folder


def age(folder: Path) -> None:
    os.utime(folder, (time.time() - BEGUN_SECONDS - 1,) * 2)


def test_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_stays():
    (killed, left), (living, kept) = held(), held()
    killed.kill()
    killed.wait()
    assert left.exists()
    with scratch("of_a_test_") as own:
        assert not left.exists() and (kept / "file").exists() and Path(own).is_dir()
    assert not Path(own).exists()
    living.communicate("")
    assert not kept.exists()


def test_folder_that_has_just_been_made_is_left_to_who_has_yet_to_lock_it(tmp_path):
    young, old = tmp_path / "of_a_test_young", tmp_path / "of_a_test_old"
    young.mkdir(), old.mkdir()
    age(old)
    with scratch("of_a_test_"):
        assert young.exists() and not old.exists()
