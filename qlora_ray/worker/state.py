"""What has happened in a run: the few numbers that the loop decides by, and everything that training changes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names


@dataclass(frozen=True)
class AdapterState:
    """Everything that training changes, whole, in float32 on the CPU, by parameter name."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]  # by parameter, then exp_avg and exp_avg_sq
    optimizer_step: int  # fewer than steps where some were skipped
    loss_scale: float | None = None  # of float16


@dataclass(frozen=True)
class State:
    """What has happened; replaced each step, and kept in checkpoints. What follows from the step is not in it."""

    step: int = 0  # optimizer steps done: the data cursor
    first_loss: float | None = None  # nats per unmasked token, of the first line of metrics.jsonl
    last_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_eval_step: int | None = None
    evaluations_without_improvement: int = 0
    num_skipped_steps: int = 0  # whose gradient was not finite
    num_skipped_in_a_row: int = 0

    @classmethod
    def of(cls, values: dict[str, Any]) -> "State":
        """From what a checkpoint holds; entries of another version that are derived now are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def has_ended(self, num_steps: int, patience: int | None) -> bool:
        """Whether nothing is left to train: the plan's steps are done, or validations have not improved for long."""
        return self.step >= num_steps or self.is_patience_over(patience)

    def is_patience_over(self, patience: int | None) -> bool:
        """Whether `patience` validations in a row (None: any number) have brought nothing better."""
        return patience is not None and self.evaluations_without_improvement >= patience
