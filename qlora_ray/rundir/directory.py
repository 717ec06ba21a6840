"""A run's directory: its name, whether it may be gone on with, and what is written there before the first step."""

import dataclasses
import datetime
import json
import re
import subprocess
from typing import Any

import yaml

from qlora_ray.config import Config, bundled_root
from qlora_ray.data.prepare import Prepared
from qlora_ray.data.stats import DataStats
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import BaseFacts
from qlora_ray.planning.plan import Plan
from qlora_ray.rundir import checkpoints, names
from qlora_ray.storage import Folder

# Left out where empty: old runs know none of them.
SHAPE_OF_LORA = ("exclude_modules", "rank_pattern", "alpha_pattern", "new_tokens", "modules_to_save")

# Parts of an identity that old runs do not know, and what it was with them.
OF_OLD_RUNS = {"start_from": None}

# What decides each part of a run's identity.
KEYS = {
    "order": "data.order", "data": "data.train_file, or what rows are made with (data, training.max_length, "
    "training.packing, the base's tokenizer)", "lora": "model", "quantization": "quantization",
    "seed": "training.seed", "batch": "training", "batch.rows": "training.batch_size",
    "batch.micro_batches": "training.gradient_accumulation_steps x ray.num_workers / training.sequence_parallel "
    "(training.global_batch_size)",
    "start_from": "sha256 of model.start_from's adapter_model.safetensors",
    "base": "model.base_model", "base.model_type": "model.base_model's model_type",
    "base.rope_scaling": "model.rope_scaling",
    "base.num_parameters": "model.base_model's parameters", "base.sha256": "model.base_model's files",
}  # fmt: skip


def find_run(config: Config, config_name: str, storage: Folder, resume: bool) -> Folder:
    """The run directory to make or, with resume, to go on with. Raises ConfigError."""
    run = storage / name_of_run(config, config_name, storage, resume)
    if resume and checkpoints.newest_whole(run) is None:
        raise ConfigError(f"--resume: {run.path} has no checkpoint. Leave --resume out to start the run.")
    refuse_taken_name(run, resume)
    return run


def name_of_run(config: Config, config_name: str, storage: Folder, resume: bool) -> str:
    """ray.run_name; without one a new name from config and time, or with resume the newest such. Raises ConfigError."""
    name = config.ray.run_name
    prefix = re.sub(r"[^A-Za-z0-9._-]", "-", config_name)[:40]
    if name is None and resume:
        runs = [old for old in storage.list() if re.fullmatch(rf"{re.escape(prefix)}-\d{{8}}-\d{{6}}", old)]
        if not runs:
            raise ConfigError(
                f"--resume: no run named {prefix}-<time> in {storage.path}. Leave --resume out to start one."
            )
        name = runs[-1]
    if name is None:
        name = f"{prefix}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return name


def refuse_taken_name(run: Folder, resume: bool) -> None:
    """Raise ConfigError where a new run would lie in an old one's directory."""
    if not resume and run.exists():
        raise ConfigError(
            f"ray.run_name={run.name}: {run.path} is there already. Add --resume to go on, or name another run."
        )


def run_identity(
    config: Config, data: DataStats, facts: BaseFacts, plan: Plan, start: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What must not change between a run and its resumption; `start` is the lineage of model.start_from."""
    model = config.model
    code = {
        "factory": model.factory, "code": model.revision if model.trust_remote_code else None,
        "rope_scaling": model.rope_scaling,
    }  # fmt: skip
    return {
        "order": config.data.order,
        "data": data.fingerprint,
        "base": {
            "model_type": facts.model_type,
            "num_parameters": facts.num_parameters,
            "sha256": facts.fingerprint,
            **{name: value for name, value in code.items() if value},
        },
        "lora": model.model_dump(include={"lora_r", "lora_alpha", "target_modules", "lora_variant"})
        | {name: value for name in SHAPE_OF_LORA if (value := getattr(model, name))},
        "quantization": config.quantization.model_dump(),
        "seed": config.training.seed,
        "batch": {"rows": plan.micro_batch_size, "micro_batches": plan.micro_batches_per_step},
        "start_from": start and start["sha256"],
    }


def check_resumable(run: Folder, identity: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The manifest of the run to go on with, {} for a new one.

    Raises ConfigError for another base, data, LoRA shape or batch than the run began with.
    """
    if not resume:
        return {}
    try:
        manifest = json.loads((run / names.MANIFEST).read_bytes())
        before = manifest["identity"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--resume: {run.path}/{names.MANIFEST} cannot be read ({error}). Start a new run.") from None
    for what, value in identity.items():
        if before.get(what, OF_OLD_RUNS.get(what, value)) != value:
            raise ConfigError(
                f"--resume: {run.path} was begun with another {what}: {_difference(what, before.get(what), value)}. "
                "Restore what was there before, or start a new run."
            )
    return manifest


def _difference(what: str, then: Any, now: Any) -> str:
    """The keys that decide what must not change, with their values where these can be read."""
    if what == "data":
        return f"{KEYS[what]} (before: rows {then}, now {now})"
    if not isinstance(then, dict) or not isinstance(now, dict):
        return f"{KEYS[what]}={now} (before: {then})"
    changed = [name for name in (*then, *now) if then.get(name) != now.get(name)]
    keys = {name: KEYS.get(f"{what}.{name}", f"{KEYS[what]}.{name}") for name in changed}
    return ", ".join(f"{key}={now.get(name)} (before: {then.get(name)})" for name, key in keys.items())


@dataclasses.dataclass(frozen=True)
class Ground:
    """What a run stands on: what must stay the same when it is resumed, and what should."""

    identity: dict[str, Any]  # of run_identity: another one is refused
    surroundings: dict[str, dict[str, Any]]  # versions, hardware: another one is told
    before: dict[str, Any]  # the manifest of the run that is gone on with; {} for a new one
    changed: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # settings, with this resumption
    start_from: dict[str, Any] | None = None  # the lineage of model.start_from

    @property
    def former(self) -> list[dict[str, Any]]:
        """The surroundings of the run so far, oldest first."""
        if not self.before:
            return []
        return [*self.before.get("before", []), {name: self.before.get(name) for name in self.surroundings}]


def differences(ground: Ground) -> list[str]:
    """What a resumed run finds changed below it: such a run keeps its data order, but not each bit of its result."""
    notes = []
    for what, now in ground.surroundings.items():
        then = ground.before.get(what) or now
        changed = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
        if changed:
            notes.append(
                f"Begun with other {what}: {', '.join(changed)}. Data order is kept, each bit is not promised."
            )
    return notes


def write_run_files(run: Folder, config: Config, plan: Plan, data: DataStats, ground: Ground) -> None:
    """config.yaml, plan.json and manifest.json: what was asked, what was derived, and with what."""
    (run / names.CONFIG).write_bytes(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    (run / names.PLAN).write_bytes(json.dumps(plan.as_dict(), indent=1).encode())
    manifest = {
        "identity": ground.identity,
        **ground.surroundings,
        "before": ground.former,
        "changes": [*ground.before.get("changes", []), *ground.changed],
        "git_commit": git_commit(),
        "data": dataclasses.asdict(data),
        "base_revision": config.model.revision,
        **({"start_from": ground.start_from} if ground.start_from else {}),
    }
    (run / names.MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())


def write_rejected(run: Folder, data: Prepared) -> None:
    """rejected.jsonl: a line for each record that was left out, with file, place and reason."""
    lines = b"".join(samples.rejected_lines() for samples in (*data.train, *data.validation))
    if lines:
        (run / names.REJECTED).write_bytes(lines)


def git_commit() -> str | None:
    """Commit of the checkout this package runs from; None in an installed wheel."""
    if not (bundled_root() / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(bundled_root()), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None
