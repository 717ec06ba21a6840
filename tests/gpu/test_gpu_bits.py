"""The promise on a GPU: with training.deterministic, a run that was killed ends with the bits of one that was not."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.gpu


PRODUCT = """
import os, torch
from qlora_ray.config import Config
from qlora_ray.worker.setup import choose_kernels

choose_kernels(Config.model_validate({"training": {"deterministic": True}}), torch.device("cuda"))
product = torch.mm(*[torch.ones(32, 32, device="cuda")] * 2)
is_asked_for = torch.are_deterministic_algorithms_enabled()
print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), is_asked_for, float(product[0, 0]))
"""


@pytest.mark.bites("worker.setup.WORKSPACE")
def test_products_are_reproducible_without_a_variable_that_each_would_read():
    given = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, "-c", PRODUCT]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=given)
    assert ended.stdout.split() == ["None", "True", "32.0"], ended.stderr


@pytest.mark.slow
def test_killed_run_and_another_number_of_workers_give_the_same_bits():
    command = [sys.executable, "-m", "benchmarks.same_bits", "--only", "deterministic"]
    if (count := torch.cuda.device_count()) > 1:
        command += ["--workers", str(count), "--compare", "again", "killed", "shared"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert "| deterministic | True | True | " in ended.stdout and "False" not in ended.stdout
