"""What --resume goes on with: what is left to train, and what is asked for now that was not before."""

import json
from dataclasses import dataclass
from typing import Any

import yaml

from qlora_ray.config import Config, flat
from qlora_ray.errors import ConfigError
from qlora_ray.planning.plan import Plan, learning_rate_at
from qlora_ray.rundir import checkpoints, names
from qlora_ray.rundir.metrics import read_lines
from qlora_ray.rundir.record import read_json
from qlora_ray.storage import Folder
from qlora_ray.worker.state import State

# Sections and keys whose value decides nothing that is trained, or does so through the run's identity, which is
# compared on its own (rundir/directory.py). A key that is not here is told, and refused where nothing is left to train.
DECIDES_NO_STEP = (
    "quantization", "data", "deepspeed", "ray", "checkpoint", "watchdog", "logging",
    "model.base_model", "model.revision", "model.trust_remote_code", "model.factory", "model.rope_scaling",
    "model.start_from", "model.cache_quantized",
    "training.batch_size", "training.gradient_accumulation_steps", "training.global_batch_size",
    "training.max_length", "training.packing", "training.share_prompts",
    "training.recompute", "training.memory_budget_gib", "training.dequantized_weights",
)  # fmt: skip
AT_THE_END = ("evaluation.num_prompts", "evaluation.max_new_tokens")  # done again, by a run with no step left too
SCHEDULE = {
    "training.learning_rate", "training.lr_schedule", "training.warmup_ratio", "training.num_epochs",
    "training.max_steps",
}  # fmt: skip


@dataclass(frozen=True)
class Resumption:
    """A run that is gone on with."""

    state: State  # of its newest checkpoint
    has_ended: bool  # nothing is left to train, as the plan is now
    is_done: bool  # it was closed in order where it stands
    changes: dict[str, tuple[Any, Any]]  # before and now, of each key that decides something
    learning_rate: float | None  # of its last step

    @property
    def decides_steps(self) -> dict[str, tuple[Any, Any]]:
        """Those of the changes that only further steps could carry out."""
        return {key: values for key, values in self.changes.items() if not _is_in(key, AT_THE_END)}

    @property
    def is_complete(self) -> bool:
        """Whether the run is done, and with what is asked for now."""
        return self.is_done and self.has_ended and not self.changes


def look(run: Folder, config: Config, plan: Plan) -> Resumption:
    """What is there to go on with. Raises ConfigError for what cannot be read, or would change what is done already."""
    newest = checkpoints.newest_whole(run)
    assert newest is not None  # directory.find_run has seen it
    state = State.of(json.loads(newest[1]["state.json"])["state"])
    summary = read_json(run / names.SUMMARY)
    is_done = (summary.get("status"), summary.get("steps")) == ("done", state.step) and (run / names.ADAPTER).exists()
    rates = [
        line["learning_rate"] for line in read_lines(run) if "learning_rate" in line and line["step"] <= state.step
    ]
    has_ended = state.has_ended(plan.num_steps, config.training.early_stopping_patience)
    found = Resumption(state, has_ended, is_done, _changes(run, config), rates[-1] if rates else None)
    if has_ended and found.decides_steps:
        raise ConfigError(_why_not(found, plan))
    return found


def notes(found: Resumption, config: Config, plan: Plan) -> list[str]:
    """What goes on otherwise than before, and from which step on."""
    if not found.changes:
        return []
    first = found.state.step + 1
    changed = ", ".join(f"{key} {_shown(then)} -> {_shown(now)}" for key, (then, now) in found.changes.items())
    told = [f"Changed from step {first:,} on: {changed}."]
    if "training.sequence_parallel" in found.changes:
        told.append(
            "training.sequence_parallel: the parts of a gradient are added in another order. Data order is kept; from "
            f"step {first:,} on the last bits are not those of the number before."
        )
    if found.changes.keys() & SCHEDULE:
        rate = learning_rate_at(found.state.step, plan, config)
        before = "" if found.learning_rate is None else f" (the run so far ended at {found.learning_rate:.3g})"
        told.append(f"Learning rate from step {first:,} on: {rate:.3g}{before}, planned over {plan.num_steps:,} steps.")
    return told


def record(found: Resumption) -> dict[str, Any]:
    """What the manifest keeps of the changes."""
    return {"after_step": found.state.step, "changed": {key: list(values) for key, values in found.changes.items()}}


def _changes(run: Folder, config: Config) -> dict[str, tuple[Any, Any]]:
    """A key that the run's version did not know had what is its default now."""
    try:
        written = flat(yaml.safe_load((run / names.CONFIG).read_bytes()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"--resume: {run.path}/{names.CONFIG} cannot be read ({error}). Start a new run.") from None
    before, now = flat(Config().model_dump(mode="json")) | written, flat(config.model_dump(mode="json"))
    decides = [key for key in now if key in before and not _is_in(key, DECIDES_NO_STEP)]
    return {key: (before[key], now[key]) for key in decides if before[key] != now[key]}


def _why_not(found: Resumption, plan: Plan) -> str:
    changed = ", ".join(
        f"{key}={_shown(now)} (before: {_shown(then)})" for key, (then, now) in found.decides_steps.items()
    )
    step = found.state.step
    why, more = f"step {step:,} is done, of {plan.num_steps:,}", "training.max_steps"
    if step < plan.num_steps:
        why, more = f"early stopping ended the run after step {step:,}", "training.early_stopping_patience"
    return (
        f"--resume: {changed}: no step is left to be trained so: {why}. Raise {more}, restore what was there before, "
        "or start a new run."
    )


def _is_in(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
