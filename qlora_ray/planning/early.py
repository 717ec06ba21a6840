"""What is refused before Ray starts and a GPU is asked for, from names, headers and the config alone."""

import importlib.util
import json
import os
import re
from typing import Any

from qlora_ray import environment
from qlora_ray.config import Config, ConfigError, base_model_path, find_file
from qlora_ray.planning import deepspeed
from qlora_ray.planning.plan import Hardware, accumulation_of, check_workers_fit, zero_stage

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}


def refuse_before_ray(*configs: Config) -> None:
    """Refuse what can be refused in milliseconds, for a run or for all trials of a sweep. Raises ConfigError."""
    for config in configs:
        check_trackers(config)
        refuse_early(config, read_deepspeed_json(config))
        if not environment.ray_address(config.ray.address):  # Ray takes seconds to say what is known here
            cpus = config.ray.resources_per_worker.get("CPU", 1)
            check_workers_fit(config, {"CPU": cpus}, Hardware(len(os.sched_getaffinity(0)), 0))
    for config in {repr((one.data, one.model.base_model)): one for one in configs}.values():
        check_files(config)


def check_trackers(config: Config) -> None:
    """Raise ConfigError for a tracker whose package is not there."""
    for name in config.logging.trackers:
        if importlib.util.find_spec(TRACKER_PACKAGES[name]) is None:
            raise ConfigError(f'logging.trackers={name}: is not installed. pip install "qlora_ray[{name}]".')


def refuse_early(config: Config, deepspeed_json: dict[str, Any] | None) -> None:
    """Refuse what needs neither data nor hardware to refuse. Raises ConfigError."""
    accumulation, stage = accumulation_of(config), zero_stage(config)
    dtype = config.quantization.compute_dtype
    if deepspeed_json:
        ours = deepspeed.defaults(config, stage, accumulation, dtype, num_trainable=1)
        open_sections = ("bf16", "fp16") if dtype == "auto" else ()  # the GPU decides
        deepspeed.refuse_contradictions(deepspeed_json, ours, config.ray.max_workers, open_sections)


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
    from qlora_ray.model.facts import check_folder
    from qlora_ray.model.hub import local_folder

    folder = local_folder(config.model.base_model, config.model.revision)
    check_folder(folder)  # a hub's snapshot can lack what a folder can
    return folder


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
