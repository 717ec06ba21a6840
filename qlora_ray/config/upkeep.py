"""What goes on beside the steps: checkpoints, deadlines, log lines, answers to held-out prompts."""

from typing import Literal

from pydantic import Field

from qlora_ray.config.section import Section


class CheckpointConfig(Section):
    """How often a run is saved: [reliability.md](reliability.md)."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints: the most that a failure can cost. Default: ten times a run, at most 200."""
    keep: int = Field(3, ge=1)
    """Number of newest checkpoints kept."""


class WatchdogConfig(Section):
    """Deadlines, in seconds, after which a worker counts as stuck: [reliability.md](reliability.md)."""

    load_seconds: float = Field(1800, gt=0)
    """Longest time from a worker's start to its first step; then the worker is ended and the run recovers."""
    step_seconds: float = Field(600, gt=0)
    """Longest optimizer step. Once three were seen, ten times the slowest counts instead."""
    evaluate_seconds: float = Field(3600, gt=0)
    """Longest validation; learned in the same way."""
    save_seconds: float = Field(600, gt=0)
    """Longest checkpoint; learned in the same way."""
    min_seconds: float = Field(60, gt=0)
    """No learned deadline is shorter than this."""
    frozen_seconds: float = Field(120, gt=0)
    """A worker process that answers nothing for so long is killed."""


class LoggingConfig(Section):
    """What is written down while a run goes on."""

    every_steps: int = Field(10, ge=1)
    """Steps between lines of metrics.jsonl; each waits once for the GPU."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(default_factory=list)
    """Where the lines of metrics.jsonl go too, under the same names; each is an extra, e.g. "qlora_ray[wandb]"."""


class EvaluationConfig(Section):
    """Answers to held-out prompts."""

    num_prompts: int = Field(8, ge=0)
    """Held-out prompts answered at the end by base and adapter, compared exactly; 0 turns it off."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer generated, in tokens."""
    num_samples: int = Field(2, ge=0)
    """So many of them are answered at each validation too, for the report; 0 turns it off."""
