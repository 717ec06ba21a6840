"""Slabs that workers on two GPUs hold in stretches come together whole, copied from the other GPU or gathered."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from qlora_ray.model import stretches
from qlora_ray.model.homes import InMemory
from qlora_ray.model.ring import Slab, mark
from qlora_ray.model.shares import Share

pytestmark = pytest.mark.gpu


def work(rank: int, store: str, may_read: bool) -> None:
    """Bring three slabs, which all workers know, through one slot, and compare each."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    generator, slabs, wanted = torch.Generator().manual_seed(0), [], []
    for length in (100, 2**20, 2**20 + 3):
        values = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator).to(device)
        slab = Slab(torch.nn.Identity(), [])
        slab.add(values, values.shape, InMemory(values), lambda _: None)
        slabs.append(slab)
        wanted.append(values.clone())
    if not may_read:
        stretches._can_read_each_other = lambda *_: False
    copies = stretches.copies_between(slabs, Share(rank, 2), device, None)
    assert isinstance(copies, stretches.FromPeers if may_read else stretches.FromGathers)
    slot = torch.empty(max(slab.num_bytes for slab in slabs), dtype=torch.uint8, device=device)
    for _ in range(3):
        for slab, values in zip(slabs, wanted, strict=True):
            copies.wait(copies.copy(slab, slot, mark(device)))
            assert torch.equal(slot[: len(values)], values)
    dist.barrier(device_ids=[rank])  # nobody ends while another reads
    dist.destroy_process_group()


@pytest.mark.bites("model.stretches.READ_EACH_OTHER")
@pytest.mark.parametrize("may_read", [True, False])
def test_stretches_of_two_gpus_make_up_the_slab(may_read, tmp_path):
    if torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("needs two GPUs that can read each other")
    processes.spawn(work, (str(tmp_path / "store"), may_read), nprocs=2)
