"""python -m qlora_ray.train: from a YAML file to an adapter. The driver's side of a run."""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import yaml

from qlora_ray.config import Config, ConfigError, base_model_path, bundled_root, find_file, load_config


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code: 0 done, 1 failed, 2 impossible request, 130 interrupted."""
    began = time.perf_counter()
    arguments = _parser().parse_intermixed_args(argv)  # overrides and options in any order
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Slurm, Kubernetes and clouds send first
    try:
        config, name = read_arguments(arguments)
        if config.sweep is not None:
            raise ConfigError(
                f"sweep: -c {arguments.config} describes a sweep of many runs. Start it with python -m qlora_ray.tune, "
                "or train its base config alone with sweep=null."
            )
        return _train(config, name, arguments.resume, arguments.debug, began)
    except KeyboardInterrupt:
        print("Interrupted before the first step.", file=sys.stderr)
        return 130
    except ConfigError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # before the first step: a run that has started ends with a summary
        from qlora_ray.storage import DISK_IS_FULL

        if error.errno not in DISK_IS_FULL:
            raise
        print(f"error: {error}. Free space there.", file=sys.stderr)
        return 1


def add_config_arguments(parser: argparse.ArgumentParser, default: str = "configs/quickstart.yaml") -> None:
    """The arguments that every door shares."""
    parser.add_argument("-c", "--config", metavar="FILE", default=default, help=f"YAML file (default: {default})")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. training.learning_rate=1e-4")
    parser.add_argument("--deepspeed", metavar="FILE.json", help='DeepSpeed config; "auto" values are filled in')
    parser.add_argument("--debug", action="store_true", help="verbose logs, tracebacks, a table of all parameters")


def read_arguments(arguments: argparse.Namespace) -> tuple[Config, str]:
    """The config that the arguments ask for, and the name of its file without ending. Raises ConfigError."""
    path = find_file(arguments.config)
    overrides = list(arguments.overrides)
    if arguments.deepspeed:
        overrides.append(f"deepspeed.config_file={json.dumps(arguments.deepspeed)}")
    return load_config(path, overrides), path.stem


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qlora_ray.train", description="Fine-tune a 4-bit LoRA on Ray.")
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the same run")
    return parser


def _train(config: Config, config_name: str, resume: bool, debug: bool, began: float) -> int:
    from qlora_ray import cluster, screen, storage
    from qlora_ray.data.check import check_records
    from qlora_ray.plan import Hardware, check_workers_fit, refuse_early
    from qlora_ray.trackers import check_installed

    check_installed(config.logging.trackers)
    deepspeed_json = read_deepspeed_json(config)
    refuse_early(config, deepspeed_json)
    if not cluster.address(config):  # Ray takes seconds to say what is known here
        cpus = config.ray.resources_per_worker.get("CPU", 1)
        check_workers_fit(config, {"CPU": cpus}, Hardware(len(os.sched_getaffinity(0)), 0))
    check_files(config)
    folder = storage.open_folder(config.ray.storage_path)
    storage.check_writable(folder)
    run = find_run(config, config_name, folder, resume)
    check_records(config)
    cluster.set_environment(config, debug)
    try:
        return _prepare_and_fit(config, run, folder, deepspeed_json, resume, debug, began)
    finally:
        if "ray" in sys.modules:  # what it says of processes that end now goes nowhere
            with contextlib.nullcontext() if debug else screen.chatter_goes_to(os.devnull):
                sys.modules["ray"].shutdown()


def _prepare_and_fit(config, run, folder, deepspeed_json, resume, debug, began) -> int:
    from qlora_ray import cluster, screen, storage
    from qlora_ray.checks.facts import versions
    from qlora_ray.checks.quick import look_quickly
    from qlora_ray.data.prepare import prepare
    from qlora_ray.data.spread import run_on_ray
    from qlora_ray.driver import Driver
    from qlora_ray.model.facts import read_facts
    from qlora_ray.plan import Hardware, make_plan, packs, storage_bytes

    started: Future[Hardware] = Future()

    def runner():
        started.result()
        return run_on_ray

    def prepare_data():
        facts = read_facts(local_base(config))
        return facts, prepare(config, folder, packs(config, facts), runner, screen.console.out)

    # The data is prepared while Ray starts. Ray must start on this thread: its processes die with their maker.
    with ThreadPoolExecutor(1) as thread:
        prepared = thread.submit(prepare_data)
        thread.submit(importlib.import_module, "ray.train.torch")  # takes 2 s, and fit needs it
        try:
            hardware = cluster.start_ray(config, debug)
            notes, network = look_quickly(config, folder, hardware)
            started.set_result(hardware)
        except BaseException as error:
            started.set_exception(error)  # the thread may be waiting for it
            raise
        facts, data = prepared.result()
    plan = make_plan(config, data.stats, facts, hardware, deepspeed_json)
    identity = run_identity(config, data.stats.fingerprint, facts, plan)
    ground = {
        "versions": versions(),
        "hardware": {"use_gpu": plan.use_gpu, "accelerators": list(hardware.accelerator_types)},
    }
    before = check_resumable(run, identity, resume)
    storage.check_space(run, storage_bytes(config, plan.num_trainable_parameters))
    screen.show_plan(plan, config, data.stats, facts, run)
    for note in [*notes, *differences(before, ground)]:
        screen.say_note(note)
    write_run_files(run, config, plan, data.stats, identity, ground, before)
    write_rejected(run, data)
    summary = Driver(config, plan, run, data, debug, began, network).fit()
    screen.show_result(summary, run)
    return {"done": 0, "interrupted": 130, "refused": 2}.get(summary["status"], 1)


def check_files(config: Config) -> None:
    """What names and headers can tell, in milliseconds: data files and the base's folder. Raises ConfigError."""
    from qlora_ray.data.sources import find_sources
    from qlora_ray.model.facts import check_folder, read_facts

    for key in ("train_file", "validation_file"):
        find_sources(config, key, download=False)
    base = base_model_path(config.model.base_model)
    if os.path.isdir(base):
        check_folder(base)
        read_facts(base)
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.model.base_model) or config.model.base_model.startswith("."):
        raise ConfigError(f"model.base_model={config.model.base_model}: no such folder, and not a hub id (owner/name).")


def local_base(config: Config) -> str:
    """The folder of the base on this machine; a hub id is downloaded to the hub's cache. Raises ConfigError."""
    from qlora_ray.model.hub import local_folder

    return local_folder(config.model.base_model, config.model.revision)


def read_deepspeed_json(config: Config) -> dict | None:
    """The user's DeepSpeed JSON, or None. Raises ConfigError."""
    name = config.deepspeed.config_file
    if name is None:
        return None
    try:
        values = json.loads(find_file(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed.config_file={name}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"deepspeed.config_file={name}: not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"deepspeed.config_file={name}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"deepspeed.config_file={name}: must hold a JSON object.")
    return values


def find_run(config: Config, config_name: str, storage, resume: bool):
    """The run directory to make or, with resume, to go on with. Raises ConfigError."""
    from qlora_ray import checkpoints

    run = storage / name_of_run(config, config_name, storage, resume)
    if resume and checkpoints.newest_whole(run) is None:
        raise ConfigError(f"--resume: {run.path} has no checkpoint. Leave --resume out to start the run.")
    refuse_taken_name(run, resume)
    return run


def name_of_run(config: Config, config_name: str, storage, resume: bool) -> str:
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


def refuse_taken_name(run, resume: bool) -> None:
    """Raise ConfigError where a new run would lie in an old one's directory."""
    if not resume and run.exists():
        raise ConfigError(
            f"ray.run_name={run.name}: {run.path} is there already. Add --resume to go on, or name another run."
        )


def run_identity(config: Config, data_fingerprint: str, facts, plan) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    return {
        "data": data_fingerprint,
        "base": {"model_type": facts.model_type, "num_parameters": facts.num_parameters, "sha256": facts.fingerprint},
        "lora": config.model.model_dump(include={"lora_r", "lora_alpha", "target_modules", "lora_variant"}),
        "quantization": config.quantization.model_dump(),
        "seed": config.training.seed,
        "batch": {"rows": plan.micro_batch_size, "micro_batches": plan.micro_batches_per_step},
    }


def check_resumable(run, identity: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The manifest of the run to go on with, {} for a new one.

    Raises ConfigError for another base, data, LoRA shape or batch than the run began with.
    """
    if not resume:
        return {}
    try:
        manifest = json.loads((run / "manifest.json").read_bytes())
        before = manifest["identity"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"--resume: {run.path}/manifest.json cannot be read ({error}). Start a new run.") from None
    for what, value in identity.items():
        if what in before and before[what] != value:
            raise ConfigError(
                f"--resume: {run.path} was begun with another {what}: {before[what]}, now {value}. "
                "Restore the old setting, or start a new run."
            )
    return manifest


def differences(before: dict[str, Any], ground: dict[str, Any]) -> list[str]:
    """What a resumed run finds changed below it: such a run keeps its data order, but not each bit of its result."""
    notes = []
    for what, now in ground.items():
        then = before.get(what) or now
        changed = [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]
        if changed:
            notes.append(
                f"Begun with other {what}: {', '.join(changed)}. Data order is kept, each bit is not promised."
            )
    return notes


def write_run_files(run, config: Config, plan, stats, identity: dict[str, Any], ground, before) -> None:
    """config.yaml, plan.json and manifest.json: what was asked, what was derived, and with what."""
    import dataclasses

    (run / "config.yaml").write_bytes(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    (run / "plan.json").write_bytes(json.dumps(plan.as_dict(), indent=1).encode())
    manifest = {
        "identity": identity,
        **ground,
        "before": [*before.get("before", []), {name: before.get(name) for name in ground}] if before else [],
        "git_commit": git_commit(),
        "data": dataclasses.asdict(stats),
        "base_revision": config.model.revision,
    }
    (run / "manifest.json").write_bytes(json.dumps(manifest, indent=1).encode())


def write_rejected(run, data) -> None:
    """rejected.jsonl: a line for each record that was left out, with file, place and reason."""
    lines = b"".join(samples.rejected_lines() for samples in (*data.train, *data.validation))
    if lines:
        (run / "rejected.jsonl").write_bytes(lines)


def git_commit() -> str | None:
    """Commit of the checkout this package runs from; None in an installed wheel."""
    import subprocess

    if not (bundled_root() / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(bundled_root()), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
