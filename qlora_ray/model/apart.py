"""A base of which each worker holds a part: of every weight while it loads, then of each fused layer as a whole.

A layer's slab (model/ring.py) lies in stretches, one on each worker, and is gathered into the slot that its parameters
are views of: one collective, and nothing is copied out of what it brings.
"""

# N workers that hold the base together
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.model.homes import Home, InMemory, scales_of, values_of
from qlora_ray.model.ring import BORDER, Ring, Slab, is_fused_layer, slab_of
from qlora_ray.model.shares import Share, num_scales


@dataclass(frozen=True)
class InParts:
    """One tensor, of which each worker holds as many bytes as any other."""

    part: torch.Tensor  # uint8
    num_bytes: int  # of all, without padding
    group: Any

    def read_into(self, out: torch.Tensor) -> None:
        """Gather it. Every worker must call this."""
        out.copy_(_gathered(self.part, self.group)[: self.num_bytes])


class Apart:
    """Keeps a worker's part of each weight, and of its scales, as `part` of a parameter that has no memory.

    It is model/load.py's Keeper.
    """

    def __init__(self, device: torch.device, group: Any = None):
        self.device, self.group = device, group  # of the workers that hold it together; None: all
        self.share = Share(dist.get_rank(group), dist.get_world_size(group))

    def keep(self, parameter: Any, share: torch.Tensor) -> None:
        """Remember the share."""
        parameter.part = share

    def keep_scales(self, state: Any) -> None:
        """Keep a part of them."""
        for one in scales_of(state):
            count = one.absmax.numel()
            start, stop = self.share.of(count)
            one.absmax = self.share.padded(one.absmax[start:stop], count).clone()

    def whole(self, parameter: Any) -> torch.Tensor:
        """What all workers hold of it together."""
        return _gathered(parameter.part, self.group)[: parameter.numel()].view(parameter.shape)

    def take_largest(self, values: torch.Tensor) -> None:
        """Put the largest of all workers' values in the place of each."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)

    def is_everywhere(self, answer: bool) -> bool:
        """Whether the answer is yes on every worker."""
        answers = torch.tensor(int(answer), device=self.device)
        dist.all_reduce(answers, dist.ReduceOp.MIN)
        return bool(answers)

    def home(self, parameter: Any) -> Home:
        """Where the values are: with all workers, or here as a whole."""
        if not hasattr(parameter, "part"):
            return InMemory(_bytes(parameter.data))
        return InParts(_bytes(parameter.part), parameter.numel() * parameter.element_size(), self.group)

    def homes_of_scales(self, parameter: Any) -> list[Home]:
        """Where those of a packed weight are."""
        state = getattr(parameter, "quant_state", None)
        if state is None:
            return []
        scales, counts = [one.absmax for one in scales_of(state)], num_scales(state)
        if not hasattr(parameter, "part"):
            return [InMemory(_bytes(values)) for values in scales]
        return [
            InParts(_bytes(values), count * values.element_size(), self.group)
            for values, count in zip(scales, counts, strict=True)
        ]

    def take_part(self, parameter: Any) -> torch.Tensor:
        """The part of a parameter that stays so, whose scales become whole. Every worker must call this."""
        for one, home in zip(
            scales_of(getattr(parameter, "quant_state", None)), self.homes_of_scales(parameter), strict=True
        ):
            content = torch.empty(home.num_bytes, dtype=torch.uint8, device=self.device)
            home.read_into(content)
            one.absmax = content.view(one.absmax.dtype)
        part = parameter.part
        del parameter.part
        return part


class FromWorkers:
    """Slabs of which each worker holds a stretch: a collective brings one."""

    def __init__(self, slabs: list[Slab], keeper: Apart):
        self._group, share = keeper.group, keeper.share
        self._parts: dict[int, torch.Tensor] = {}
        for slab in slabs:  # stretches are as long as each other, and begin at borders
            slab.num_bytes = -(-slab.num_bytes // (share.size * BORDER)) * share.size * BORDER
        room = torch.zeros(max(slab.num_bytes for slab in slabs), dtype=torch.uint8, device=keeper.device)
        for slab in slabs:  # one by one, so that no more than one is whole
            slab.read_into(room)
            length = slab.num_bytes // share.size
            self._parts[id(slab)] = room[share.rank * length : (share.rank + 1) * length].clone()
            slab.show(room)  # what was whole here is free
            slab.homes.clear()
            for parameter in slab.parameters:
                _forget_part(parameter)

    def copy(self, slab: Slab, slot: torch.Tensor, passed: Any) -> Any:
        """Launch the collective, on its own stream, once the device is past what was launched before this."""
        place = slot[: slab.num_bytes]
        return dist.all_gather_into_tensor(place, self._parts[id(slab)], group=self._group, async_op=True)

    def wait(self, arrival: Any) -> None:
        """Of the device, on CPUs of the host."""
        arrival.wait()

    def part(self, slab: Slab) -> torch.Tensor:
        """What this worker holds of a slab."""
        return self._parts[id(slab)]


def pass_between_workers(model: torch.nn.Module, keeper: Apart) -> Ring | None:
    """Have fused layers' weights pass between the workers; None of a model without such. Every worker must call this.

    What is small in them becomes whole on each worker. Other weights stay as they are.
    """
    slabs = []
    for layer in filter(is_fused_layer, model.modules()):
        frozen = [parameter for parameter in layer.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            parameter.home, parameter.whole_shape = keeper.home(parameter), parameter.shape  # type: ignore[attr-defined]
        slab = slab_of(layer, keeper)
        passing = {id(parameter) for parameter in slab.parameters}
        for parameter in frozen:
            if id(parameter) not in passing:
                parameter.data = values_of(parameter, keeper.device)
                _forget_part(parameter)
        slabs.append(slab)
    return Ring(slabs, keeper.device, FromWorkers(slabs, keeper)) if slabs else None


def _forget_part(parameter: Any) -> None:
    for name in ("home", "whole_shape", "part"):
        parameter.__dict__.pop(name, None)


def _gathered(part: torch.Tensor, group: Any) -> torch.Tensor:
    whole = part.new_empty(part.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().view(-1).view(torch.uint8)
