"""A base of which each worker holds a part: of every weight while it loads, then of each fused layer as a whole.

A layer's slab (model/ring.py) lies in stretches, one on each worker, and is put together in the slot that its
parameters are views of (model/stretches.py), so that nothing is copied out of what comes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.model.ends import Ends, ends_that_pass
from qlora_ray.model.homes import Home, InMemory, scales_of, values_of
from qlora_ray.model.ring import Ring, Slab, is_fused_layer, slab_of
from qlora_ray.model.shares import Share, num_scales
from qlora_ray.model.stretches import copies_between


@dataclass(frozen=True)
class InParts:
    """One tensor, of which each worker holds as many bytes as any other."""

    part: torch.Tensor  # uint8
    num_bytes: int  # of all, without padding
    group: Any

    def read_into(self, out: torch.Tensor) -> None:
        """Gather it. Every worker must call this."""
        if len(out) == len(self.part) * dist.get_world_size(self.group):
            dist.all_gather_into_tensor(out, self.part, group=self.group)
        else:
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
        scales = scales_of(getattr(parameter, "quant_state", None))
        for one, home in zip(scales, self.homes_of_scales(parameter), strict=True):
            content = torch.empty(home.num_bytes, dtype=torch.uint8, device=self.device)
            home.read_into(content)
            one.absmax = content.view(one.absmax.dtype)
        part = parameter.part
        del parameter.part
        return part


def pass_between_workers(model: torch.nn.Module, keeper: Apart) -> Ring | None:
    """Have the weights of fused layers, and of both ends of their model, pass between the workers.

    What is small in them becomes whole on each worker. Other weights stay as they are. None of a model without fused
    layers. Every worker must call this.
    """
    layers, ends = list(filter(is_fused_layer, model.modules())), ends_that_pass(model)
    if not layers:
        return None
    of_layers = [_slab(layer, keeper) for layer in layers]
    of_ends = [_slab(end, keeper) for end in ends]
    copies = copies_between([*of_layers, *of_ends], keeper.share, keeper.device, keeper.group)
    ring = Ring(of_layers, keeper.device, copies)
    if of_ends:
        ring.ends = Ends(model, of_ends, ring, copies)
    return ring


def _slab(module: torch.nn.Module, keeper: Apart) -> Slab:
    frozen: list[Any] = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.home, parameter.whole_shape = keeper.home(parameter), parameter.shape
    slab = slab_of(module, keeper)
    passing = {id(parameter) for parameter in slab.parameters}
    for parameter in frozen:
        if id(parameter) not in passing:
            parameter.data = values_of(parameter, keeper.device)
        for name in ("home", "whole_shape", "part"):
            parameter.__dict__.pop(name, None)
    return slab


def _gathered(part: torch.Tensor, group: Any) -> torch.Tensor:
    whole = part.new_empty(part.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(whole, part, group=group)
    return whole


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().view(-1).view(torch.uint8)
