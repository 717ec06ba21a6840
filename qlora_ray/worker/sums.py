"""The gradient of a step: its micro-batches' gradients added one after the other, whichever worker computed them.

A sum of floats depends on the order. Collectives add in an order of their own, which changes with the number of
workers; here it is the order of the micro-batches, so that any number of workers gets the same bits.
"""

# P trained values, W workers, S = P / W rounded up: each worker adds up one share
import torch
import torch.distributed as dist


class OrderedSum:
    """Adds up gradients (P,) of the micro-batches of a step, in float32."""

    def __init__(self, numel: int, device: torch.device):
        self._numel, self._world_size = numel, dist.get_world_size()
        self._share = -(-numel // self._world_size)
        self._sum = torch.zeros(self._share, device=device)

    def add(self, gradient: torch.Tensor, num_present: int) -> None:
        """Add one micro-batch of each of the first `num_present` workers, in rank order; the others' are no part of it.

        Workers that share rows are neighbours in rank: the parts of a micro-batch are added one after the other, too.

        gradient (P,). Every worker must call this: it is one all-to-all, of as many bytes as a reduce-scatter.
        """
        if self._world_size == 1:
            self._sum += gradient
            return
        padded = torch.nn.functional.pad(gradient, (0, self._share * self._world_size - self._numel))
        shares = torch.empty_like(padded)
        dist.all_to_all_single(shares, padded)
        for share in shares.view(self._world_size, self._share)[:num_present]:
            self._sum += share

    def take(self) -> torch.Tensor:
        """The whole sum (P,), the same on every worker; begins anew. Every worker must call this."""
        if self._world_size == 1:
            whole = self._sum.clone()
        else:
            whole = self._sum.new_empty(self._share * self._world_size)
            dist.all_gather_into_tensor(whole, self._sum)
        self._sum.zero_()
        return whole[: self._numel]
