"""The workers of a run as seen by one of them: small host-side collectives, and the line to the driver."""

import datetime
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from qlora_ray.worker.messages import Interrupted, Message, Stepped
from qlora_ray.worker.notice import Notice

HOLD_SECONDS = 90  # longer than the controller waits for the checkpoint
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Orders:
    """What all workers do after a step."""

    stop: bool  # save, and end the run
    save: bool
    hold_until: float  # save, and wait for the end of this worker group, at most until this time.time(); 0: go on
    deadline: float  # of the next step, in seconds


class Team:
    """Rank, size, and what must be agreed. Its collectives run on gloo, so the host never waits for a GPU in them."""

    def __init__(self, channel: Any):
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._channel = channel
        self._answer: Any = None
        self._notice = Notice(lambda cause: self.tell(Interrupted(cause)))

    def tell(self, message: Message) -> None:
        """Send a message to the driver; rank 0 speaks for all."""
        if self.rank == 0:
            self._answer = self._channel.tell.remote(message)

    def tell_from_any_rank(self, message: Message) -> None:
        """Send what this worker alone knows, and wait until it has arrived."""
        ray.get(self._channel.tell.remote(message), timeout=60)

    def wait_until_told(self) -> None:
        """Return once the driver's mailbox has what was sent."""
        if self.rank == 0 and self._answer is not None:
            ray.get(self._answer, timeout=60)

    def agree(self, step: int, deadline: float, seconds_to_save: float) -> "Orders":
        """What comes next, with rank 0's `deadline` of a step: the same on every worker.

        `seconds_to_save`: what a step and a checkpoint take together. Every worker must call this after each step.
        """
        stop, why = False, None
        if self.rank == 0:
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                stop, why = ray.get(self._answer)
                self._answer = None
            if self._answer is None and not stop:
                self.tell(Stepped(step))
        save, hold_until = self._notice.look(seconds_to_save) if self.rank == 0 else (False, 0.0)
        if why is not None:
            self.tell(Interrupted(why, step))
            hold_until = time.time() + HOLD_SECONDS
        agreed = torch.tensor([stop, save, hold_until, deadline], dtype=torch.float64)
        dist.broadcast(agreed, src=0, group=self._group)
        return Orders(bool(agreed[0]), bool(agreed[1]), float(agreed[2]), float(agreed[3]))

    def sum(self, *values: float) -> list[float]:
        """Sum over the workers, in rank order, in float64. Every worker must call this."""
        return torch.stack(self._gather(values)).sum(0).tolist()

    def max(self, value: float) -> float:
        """Maximum over the workers. Every worker must call this."""
        return float(torch.stack(self._gather((value,))).max())

    def gather(self, value: Any) -> list[Any]:
        """Any JSON-like value of each worker, by rank. Every worker must call this."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _gather(self, values: tuple[float, ...]) -> list[torch.Tensor]:
        mine = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(gathered, mine, group=self._group)
        return gathered
