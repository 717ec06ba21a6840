"""Slabs of which each worker holds one stretch, and how they are put together while the device computes.

Where GPUs of one host can read each other's memory, each copies what the others hold: weights are frozen, so nobody
need be asked, and copies take none of the processors that products run on. Elsewhere a collective brings a slab.
Stands on internals of torch: READ_EACH_OTHER.
"""

import datetime
import logging
import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.libraries import Patch
from qlora_ray.model.ring import BORDER, Copies, Slab
from qlora_ray.model.shares import Share

MAX_CTAS = 8  # of NCCL's: products that find all processors but these are faster than a faster gather
TIMEOUT = datetime.timedelta(minutes=30)  # as of the workers' other groups
READ_EACH_OTHER = Patch(
    "torch", "2.13.0", "torch.multiprocessing.reductions.reduce_tensor gives what rebuilds a tensor in another "
    "process, the seventh argument of which is the device that it is mapped for",
    gains="layers that other GPUs hold are copied over NVLink without a kernel: NCCL's take processors of the products",
    delete_when="NCCL gathers by copy engines where it is asked to, in every version that pyproject.toml allows",
)  # fmt: skip
logger = logging.getLogger(__name__)


def copies_between(slabs: list[Slab], share: Share, device: torch.device, group: Any) -> Copies:
    """Keep this worker's stretch of each slab, and know how to get the others'. Every worker must call this."""
    stretches = _take_stretches(slabs, share, device)
    if _can_read_each_other(device, group):
        logger.info("layers are copied from the GPUs of the other workers")
        return FromPeers(stretches, share, device, group)
    logger.info("layers are gathered from the other workers")
    return FromGathers(stretches, device, group)


def _take_stretches(slabs: list[Slab], share: Share, device: torch.device) -> dict[int, torch.Tensor]:
    """By the slab's id. What held its bytes is free from here on; what shows them, shows nothing until it is in a slot.

    Stretches are as long as each other, and begin at borders.
    """
    for slab in slabs:
        slab.num_bytes = -(-slab.num_bytes // (share.size * BORDER)) * share.size * BORDER
    room, stretches = torch.zeros(max(slab.num_bytes for slab in slabs), dtype=torch.uint8, device=device), {}
    for slab in slabs:  # one by one, so that no more than one is whole
        slab.read_into(room)
        length = slab.num_bytes // share.size
        stretches[id(slab)] = room[share.rank * length : (share.rank + 1) * length].clone()
        slab.show(room)
        slab.homes.clear()
    return stretches


class FromGathers:
    """Slabs that a collective brings. All workers must copy the same ones in the same order."""

    def __init__(self, stretches: dict[int, torch.Tensor], device: torch.device, group: Any):
        self.stretches, self._group = stretches, group
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options.config.max_ctas, options._timeout = MAX_CTAS, TIMEOUT
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            self._group = dist.new_group(ranks, TIMEOUT, pg_options=options, use_local_synchronization=True)

    def copy(self, slab: Slab, slot: torch.Tensor, passed: Any) -> Any:
        """Launch the collective, on its own stream, once the device is past what was launched before this."""
        place = slot[: slab.num_bytes]
        return dist.all_gather_into_tensor(place, self.stretches[id(slab)], group=self._group, async_op=True)

    def wait(self, arrival: Any) -> None:
        """Of the device, on CPUs of the host."""
        arrival.wait()


class FromPeers:
    """Slabs whose stretches are read from the GPUs of the workers that hold them, who take no part in it."""

    def __init__(self, stretches: dict[int, torch.Tensor], share: Share, device: torch.device, group: Any):
        from torch.multiprocessing.reductions import reduce_tensor

        self.stretches, self._stream = stretches, torch.cuda.Stream(device)
        torch.cuda.synchronize(device)  # they are there when others read them
        told: list[Any] = [None] * share.size
        dist.all_gather_object(told, [reduce_tensor(one) for one in stretches.values()], group=group)
        order = [(share.rank + step) % share.size for step in range(share.size)]  # so that not all read one at a time
        self._places: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for number, (slab, own) in enumerate(stretches.items()):
            of_all = [(rank, own if rank == share.rank else _mapped(told[rank][number], device)) for rank in order]
            self._places[slab] = [(rank * own.numel(), part) for rank, part in of_all]

    def copy(self, slab: Slab, slot: torch.Tensor, passed: Any) -> Any:
        """Launch it on a stream of its own."""
        self._stream.wait_event(passed)
        with torch.cuda.stream(self._stream):
            for start, part in self._places[id(slab)]:
                slot[start : start + part.numel()].copy_(part, non_blocking=True)
            return self._stream.record_event()

    def wait(self, arrival: Any) -> None:
        """Of the device alone."""
        torch.cuda.current_stream().wait_event(arrival)


def _mapped(reduced: Any, device: torch.device) -> torch.Tensor:
    """Memory of another process's GPU in this one's addresses, without anything of this process on that GPU."""
    rebuild, arguments = reduced
    return rebuild(*arguments[:6], device.index, *arguments[7:])


def _can_read_each_other(device: torch.device, group: Any) -> bool:
    """Whether all workers of the group have GPUs of one host that do. Every worker must call this."""
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    mine = (device.type, device.index, socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (*mine, "expandable_segments:True" in settings), group=group)
    is_one_host = device.type == "cuda" and len({(kind, *where) for kind, _, *where in told}) == 1
    others = {index for _, index, *_ in told} - {device.index}
    can = is_one_host and not told[0][-1] and len(others) == len(told) - 1
    can = can and all(torch.cuda.can_device_access_peer(device, other) for other in others)
    answers: list[Any] = [None] * len(told)
    dist.all_gather_object(answers, can, group=group)
    return all(answers)
