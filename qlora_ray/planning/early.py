"""What is refused before Ray starts and a GPU is asked for, from names, headers and the config alone."""

import importlib.util
import json
import logging
import os
import re
from typing import Any

from qlora_ray import environment
from qlora_ray.config import Config, base_model_path, find_file
from qlora_ray.errors import ConfigError
from qlora_ray.model import host
from qlora_ray.model.facts import (
    ModelFacts,
    check_config,
    check_folder,
    has_config_alone,
    has_mxfp4,
    read_facts,
    stored_quantization,
)
from qlora_ray.model.own_code import refuse_unread_code
from qlora_ray.model.start import check_base, open_start
from qlora_ray.planning import deepspeed, offload
from qlora_ray.planning.deepspeed import zero_stage
from qlora_ray.planning.hardware import Hardware, check_workers_fit
from qlora_ray.planning.memory import GIB
from qlora_ray.planning.offload import Passing
from qlora_ray.planning.rows import accumulation_of

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}


def refuse_before_ray(*configs: Config) -> None:
    """Refuse what can be refused in milliseconds, for a run or for all trials of a sweep. Raises ConfigError."""
    for config in configs:
        check_trackers(config)
        refuse_early(config, read_deepspeed_json(config))
        if not environment.ray_address(config.ray.address):  # Ray takes seconds to say what is known here
            cpus = config.ray.resources_per_worker.get("CPU", 1)
            check_workers_fit(config, {"CPU": cpus}, Hardware(len(os.sched_getaffinity(0)), 0))
            check_disk(config)
    for config in {repr((one.data, one.model)): one for one in configs}.values():
        check_files(config)


def check_disk(config: Config) -> None:
    """Refuse a deepspeed.nvme_path of this machine that cannot take the weights that pass. Raises ConfigError."""
    folder, key = config.deepspeed.nvme_path, f"deepspeed.nvme_path={config.deepspeed.nvme_path}"
    if folder is None:
        return
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        why = "cannot be written to" if os.path.isdir(folder) else "no such folder"
        raise ConfigError(f"{key}: {why}. Name a folder on a local disk, or use deepspeed.offload_params=cpu.")


def check_room(config: Config, passing: Passing) -> None:
    """Refuse weights that pass where this machine, on which all workers will be, has no room. Raises ConfigError."""
    from qlora_ray.model.homes import disk_free

    ds, workers = config.deepspeed, config.ray.min_workers
    each = f"{workers} workers keep" if workers > 1 else "a worker keeps"
    need, free = workers * passing.host_bytes, host.available_bytes()
    if need > free:
        raise ConfigError(
            f"deepspeed.offload_params={ds.offload_params}: {each} {need / GIB:.2f} GiB in host memory, and "
            f"{free / GIB:.2f} are free. Use fewer workers (ray.num_workers)"
            f"{', or nvme with deepspeed.nvme_path' if ds.nvme_path is None else ''}."
        )
    if ds.nvme_path is None:
        return
    need, free = workers * passing.disk_bytes, disk_free(ds.nvme_path)
    if need > free:
        raise ConfigError(
            f"deepspeed.nvme_path={ds.nvme_path}: {each} {need / GIB:.2f} GiB there, and {free / GIB:.2f} are free. "
            "Free space, or name a folder on a larger local disk."
        )


def check_trackers(config: Config) -> None:
    """Raise ConfigError for a tracker whose package is not there."""
    for name in config.logging.trackers:
        if importlib.util.find_spec(TRACKER_PACKAGES[name]) is None:
            raise ConfigError(f'logging.trackers={name}: is not installed. pip install "qlora_ray[{name}]".')


def refuse_early(config: Config, deepspeed_json: dict[str, Any] | None) -> None:
    """Refuse what needs neither data nor hardware to refuse. Raises ConfigError."""
    config = offload.taken_from_json(config, deepspeed_json)
    accumulation, stage = accumulation_of(config), zero_stage(config)
    dtype = config.quantization.compute_dtype
    if deepspeed_json:
        ours = deepspeed.defaults(config, stage, accumulation, dtype, num_trainable=1)
        open_sections = ("bf16", "fp16") if dtype == "auto" else ()  # the GPU decides
        deepspeed.refuse_contradictions(deepspeed_json, ours, config.num_row_groups, open_sections)


def check_files(config: Config) -> None:
    """What names and headers can tell, in milliseconds: data files and the base's folder. Raises ConfigError."""
    from qlora_ray.data.sources import find_sources
    from qlora_ray.model.hub import folder_at_hand

    for key in ("train_file", "validation_file"):
        find_sources(config, key, download=False)
    start = open_start(config.model)
    folder = folder_at_hand(config.model.base_model, config.model.revision)
    if folder:
        _check_base(config, folder)
        read_facts(folder)
        if start:
            check_base(start, folder, config.model)
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.model.base_model) or config.model.base_model.startswith("."):
        raise ConfigError(f"model.base_model={config.model.base_model}: no such folder, and not a hub id (owner/name).")


def local_base(config: Config) -> str:
    """The folder of the base on this machine; a hub id is downloaded to the hub's cache. Raises ConfigError."""
    from qlora_ray.model.hub import local_folder

    folder = local_folder(config.model.base_model, config.model.revision)
    _check_base(config, folder)  # a hub's snapshot can lack what a folder can
    return folder


def exact_facts(config: Config, folder: str | None = None) -> ModelFacts:
    """What the base in `folder` (default: where it lies, or is downloaded to) and its adapter hold: imports torch.

    Raises ConfigError where the base's files do not fill the model that will be built, or an entry of the adapter's
    settings matches none of its layers: a worker would find it out with a GPU in hand.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # announces optional CPU kernels where PEFT imports it
    from qlora_ray.data.tokenize import pieces_of
    from qlora_ray.model.meta import model_facts, model_facts_of_config

    folder, model = folder or local_base(config), config.model
    new_tokens = pieces_of(model.new_tokens, folder, model.trust_remote_code) if model.new_tokens else {}
    facts = (model_facts_of_config if has_config_alone(folder) else model_facts)(folder, model, new_tokens)
    coefficient = config.training.router_aux_loss_coef
    if coefficient and not facts.has_balancing_loss:
        raise ConfigError(
            f"training.router_aux_loss_coef={coefficient:g}: {facts.model_type} models have no load-balancing loss. "
            "Leave it out."
        )
    return facts


def facts_at_hand(config: Config) -> ModelFacts | None:
    """The same of a base that is on this machine; None of one that would have to be downloaded. Raises ConfigError."""
    from qlora_ray.model.hub import folder_at_hand

    folder = folder_at_hand(config.model.base_model, config.model.revision)
    if folder is None:
        return None
    _check_base(config, folder)
    return exact_facts(config, folder)


def planned_facts(config: Config) -> ModelFacts | None:
    """As facts_at_hand; of a folder without weights what its config.json says. Raises ConfigError."""
    folder = base_model_path(config.model.base_model)
    if not os.path.isdir(folder) or not has_config_alone(folder):
        return facts_at_hand(config)
    check_config(folder)
    refuse_unread_code(folder, config.model, f"model.base_model={config.model.base_model}")
    return exact_facts(config, folder)


def as_stored(config: Config) -> Config:
    """The config with the 4-bit settings of a base that is on this machine and stored in 4 bits: its own win."""
    from qlora_ray.model.hub import folder_at_hand

    folder = folder_at_hand(config.model.base_model, config.model.revision)
    stored = stored_quantization(folder) if folder else None
    if stored is None:
        return config
    return config.model_copy(update={"quantization": config.quantization.model_copy(update=_settings_of(stored))})


def _settings_of(stored: dict[str, Any]) -> dict[str, Any]:
    is_double = bool(stored.get("bnb_4bit_use_double_quant"))
    return {"type": stored.get("bnb_4bit_quant_type", "fp4"), "double_quant": is_double}


def _check_base(config: Config, folder: str) -> None:
    """Raise ConfigError for a folder that lacks what a base needs, or is stored otherwise than the config asks."""
    check_folder(folder)
    key = f"model.base_model={config.model.base_model}"
    refuse_unread_code(folder, config.model, key)
    if config.quantization.type == "none" and has_mxfp4(folder):
        raise ConfigError(f"quantization.type=none: {key} is stored in MXFP4, and trained on in nf4 or fp4 alone.")
    stored = stored_quantization(folder)
    if stored is None:
        return
    if config.model.lora_variant == "loftq":
        raise ConfigError(f"model.lora_variant=loftq: needs the unquantized weights, and {key} is stored in 4 bits.")
    for name, value in _settings_of(stored).items():
        asked = getattr(config.quantization, name)
        if name in config.quantization.model_fields_set and asked != value:
            raise ConfigError(
                f"quantization.{name}={str(asked).lower()}: {key} is stored in 4 bits with {str(value).lower()}. "
                "Leave the setting out, or name the model that it was quantized from."
            )
    storage = stored.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ConfigError(
            f"{key}: its 4-bit weights are stored as {storage} (bnb_4bit_quant_storage), which ZeRO would cast like "
            "numbers. Name the model that it was quantized from, or save it with bnb_4bit_quant_storage uint8."
        )


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
