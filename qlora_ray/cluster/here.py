"""What this machine has to train on."""

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
    found = node_facts.gpus()
    if num_gpus and num_gpus > len(found):
        raise ConfigError(f"--gpus {num_gpus}: this machine has {len(found)}. Say how much memory each has: --gib M.")
    if not found:
        return Machine(1, psutil.virtual_memory().available / GIB, use_gpu=False)
    chosen = sorted((gpu["free_gib"] for gpu in found), reverse=True)[: num_gpus or len(found)]
    return Machine(len(chosen), min(chosen), use_gpu=True)
