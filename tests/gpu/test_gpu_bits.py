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

{first}
product = torch.mm(*[torch.ones(32, 32, device="cuda")] * 2)
print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), float(product[0, 0]))
"""
CHOOSE = 'choose_kernels(Config.model_validate({"training": {"deterministic": True}}), torch.device("cuda"))'


@pytest.mark.bites("worker.setup.WORKSPACE")
@pytest.mark.parametrize(
    "first, works", [(CHOOSE, True), ("torch.use_deterministic_algorithms(True)", False)], ids=["with", "without"]
)
def test_products_are_reproducible_without_a_variable_that_each_would_read(first, works):
    given = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, "-c", PRODUCT.format(first=first)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=given)
    assert ("None 32.0" in ended.stdout) == works
    assert ("CUBLAS_WORKSPACE_CONFIG" in ended.stderr) == (not works)


@pytest.mark.slow
def test_killed_run_and_another_number_of_workers_give_the_same_bits():
    command = [sys.executable, "-m", "benchmarks.same_bits", "--only", "deterministic"]
    if (count := torch.cuda.device_count()) > 1:
        command += ["--workers", str(count), "--compare", "again", "killed", "shared"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert "| deterministic | True | True | " in ended.stdout and "False" not in ended.stdout
