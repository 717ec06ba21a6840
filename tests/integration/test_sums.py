"""Gradients of micro-batches are added in one order, whichever worker computed them: checked to the bit."""

import json
import subprocess
import sys

import pytest
import torch

NUM_MICRO_BATCHES, NUMEL = 7, 1001  # neither is a multiple of a number of workers

WORKER = """
import json, sys, torch, torch.distributed as dist
from qlora_ray.worker.sums import OrderedSum
store, rank, size, count, numel = sys.argv[1], *map(int, sys.argv[2:])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
total = OrderedSum(numel, torch.device("cpu"))
for _ in range(2):  # it begins anew each time
    for first in range(0, count, size):
        present = min(size, count - first)
        number = first + rank if rank < present else 10_000  # what must not be counted
        generator = torch.Generator().manual_seed(number)
        total.add(torch.randn(numel, generator=generator).to(torch.bfloat16), present)
    whole = total.take()
print(json.dumps(whole.tolist()))
"""


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_sum_is_that_of_one_micro_batch_after_the_other(num_workers, tmp_path):
    arguments = (num_workers, NUM_MICRO_BATCHES, NUMEL)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path / "store", *map(str, (rank, *arguments))],
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(num_workers)
    ]  # fmt: skip
    sums = [json.loads(worker.communicate(timeout=200)[0]) for worker in workers]
    expected = torch.zeros(NUMEL)
    for number in range(NUM_MICRO_BATCHES):
        expected += torch.randn(NUMEL, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)
    assert all(one == expected.tolist() for one in sums)
