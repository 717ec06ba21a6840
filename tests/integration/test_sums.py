"""Gradients of micro-batches are added in one order, whichever worker computed them: checked to the bit."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from qlora_ray.worker.sums import OrderedSum
from tests.integration import ranks

NUM_MICRO_BATCHES, NUMEL = 7, 1001  # neither is a multiple of a number of workers


def gradient(number: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)


def add_up(folder: Path, rank: int, size: int) -> None:
    """What each worker does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    total = OrderedSum(NUMEL, torch.device("cpu"))
    for _ in range(2):  # it begins anew each time
        for first in range(0, NUM_MICRO_BATCHES, size):
            present = min(size, NUM_MICRO_BATCHES - first)
            number = first + rank if rank < present else 10_000  # what must not be counted
            total.add(gradient(number), present)
        whole = total.take()
    (folder / f"{rank}.json").write_text(json.dumps(whole.tolist()))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_sum_is_that_of_one_micro_batch_after_the_other(num_workers, tmp_path):
    sums = ranks.run_each(add_up, num_workers, tmp_path / "run")
    expected = torch.zeros(NUMEL)
    for number in range(NUM_MICRO_BATCHES):
        expected += gradient(number)
    assert all(one == expected.tolist() for one in sums)
