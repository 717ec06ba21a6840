"""What has happened in a run: the few numbers that the loop decides by, and everything that training changes."""

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names


@dataclass(frozen=True)
class AdapterState:
    """Everything that training changes, whole, in float32 on the CPU, by parameter name."""

    weights: "dict[str, torch.Tensor]"
    moments: "dict[str, dict[str, torch.Tensor]]"  # by parameter, then exp_avg and exp_avg_sq
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
    best_value: float | None = None  # of training.metric_for_best_model, where that is another than eval_loss
    evaluations_without_improvement: int = 0
    num_skipped_steps: int = 0  # whose gradient was not finite
    num_skipped_in_a_row: int = 0

    @classmethod
    def of(cls, values: dict[str, Any]) -> "State":
        """From what a checkpoint holds; entries of another version that are derived now are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def evaluated(self, metrics: dict[str, float], decides: str) -> "State":
        """After a validation at this step; `decides` names the figure that says whether it is the best so far."""
        loss, value = metrics["eval_loss"], metrics[decides]
        is_lowest = self.best_eval_loss is None or loss < self.best_eval_loss
        is_best = is_lowest if decides == "eval_loss" else self.best_value is None or value > self.best_value
        return replace(
            self, eval_loss=loss, best_eval_loss=loss if is_lowest else self.best_eval_loss,
            best_value=value if is_best and decides != "eval_loss" else self.best_value,
            best_eval_step=self.step if is_best else self.best_eval_step,
            evaluations_without_improvement=0 if is_best else self.evaluations_without_improvement + 1,
        )  # fmt: skip

    def has_ended(self, num_steps: int, patience: int | None) -> bool:
        """Whether nothing is left to train: the plan's steps are done, or validations have not improved for long."""
        return self.step >= num_steps or self.is_patience_over(patience)

    def is_patience_over(self, patience: int | None) -> bool:
        """Whether `patience` validations in a row (None: any number) have brought nothing better."""
        return patience is not None and self.evaluations_without_improvement >= patience
