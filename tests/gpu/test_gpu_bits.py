"""The promise on a GPU: with training.deterministic, a run that was killed ends with the bits of one that was not."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.slow
def test_killed_run_and_another_number_of_workers_give_the_same_bits():
    command = [sys.executable, "-m", "benchmarks.same_bits", "--only", "deterministic"]
    if (count := torch.cuda.device_count()) > 1:
        command += ["--workers", str(count), "--compare", "again", "killed", "shared"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert "| deterministic | True | True | " in ended.stdout and "False" not in ended.stdout
