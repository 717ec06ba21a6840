"""What this machine has to train on."""

import os
from typing import Any

import psutil

from qlora_ray.cluster import node_facts
from qlora_ray.errors import ConfigError
from qlora_ray.planning.memory import GIB
from qlora_ray.planning.suggest import Machine


def machine(num_gpus: int | None, gib: float | None) -> Machine:
    """What is asked for, else what is here: the GPUs with most free memory, or the CPU. Raises ConfigError."""
    for option, value in (("--gpus", num_gpus), ("--gib", gib)):
        if value is not None and value <= 0:
            raise ConfigError(f"{option} {value:g}: must be more than 0.")
    if gib:
        return Machine(num_gpus or 1, gib, use_gpu=True)
    found = visible(node_facts.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if num_gpus and num_gpus > len(found):
        raise ConfigError(f"--gpus {num_gpus}: this machine has {len(found)}. Say how much memory each has: --gib M.")
    if not found:
        return Machine(1, psutil.virtual_memory().available / GIB, use_gpu=False)
    chosen = sorted((gpu["free_gib"] for gpu in found), reverse=True)[: num_gpus or len(found)]
    return Machine(len(chosen), min(chosen), use_gpu=True)


def visible(gpus: list[dict[str, Any]], names: str | None) -> list[dict[str, Any]]:
    """Of all GPUs those that CUDA_VISIBLE_DEVICES names by place or by the beginning of a UUID, up to an unknown name.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables".
    """
    if names is None:
        return gpus
    chosen = []
    for name in (one.strip() for one in names.split(",")):
        if name.isdecimal():
            found = gpus[int(name) :][:1]
        else:
            found = [gpu for gpu in gpus if name and gpu["uuid"].startswith(name)]
        if len(found) != 1:
            break
        chosen += found
    return chosen
