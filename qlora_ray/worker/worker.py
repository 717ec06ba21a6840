"""What one worker holds from its first step to its last."""

from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_ray.worker.engine import Engine
from qlora_ray.worker.messages import Run
from qlora_ray.worker.metrics import Meter
from qlora_ray.worker.preference import Preference
from qlora_ray.worker.saver import Saver
from qlora_ray.worker.seat import Seat, seat_of
from qlora_ray.worker.state import State
from qlora_ray.worker.team import Team


@dataclass(frozen=True)
class Worker:
    """Made once the model is loaded; the parts change, the worker does not."""

    run: Run
    team: Team
    engine: Engine
    tokenizer: Any
    device: torch.device
    meter: Meter
    saver: Saver
    preferences: dict[str, Preference] = field(default_factory=dict)  # by split, where pairs are trained on

    @property
    def seat(self) -> Seat:
        """Which rows it takes, and which part of each."""
        return seat_of(self.team.rank, self.team.size, self.run.config.training.sequence_parallel)

    def reached(self, state: State) -> dict[str, Any]:
        """The state and what follows from its step, as summary.json and the record of an adapter have it."""
        tokens, labels = self.meter.counts.until(state.step)
        return {**vars(state), "num_tokens": tokens, "num_label_tokens": labels}
