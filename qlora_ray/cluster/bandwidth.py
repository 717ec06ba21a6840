"""How fast each node's disk gives what lies on it, and its host what goes to a GPU: measured as training does it."""

import time
from typing import Any

import ray
from ray.exceptions import RayError

from qlora_ray.cluster.ask import first_line, nodes_by_name, on_node
from qlora_ray.errors import ConfigError

NUM_BYTES = 2**28
TIMES = 3


def measure(folder: str | None, use_gpu: bool, seconds: float) -> dict[str, dict[str, Any]]:
    """By node: bytes per second of the disk under `folder` (None: not asked) and to a GPU, or why there are none."""
    task: Any = ray.remote(measure_here)
    deadline, told = time.monotonic() + seconds, {}
    asked = {
        name: task.options(
            **on_node(node, max_retries=0, num_gpus=1 if use_gpu and node["Resources"].get("GPU") else 0)
        ).remote(folder, use_gpu and bool(node["Resources"].get("GPU")))
        for name, node in nodes_by_name().items()
    }
    for name, answer in asked.items():
        try:
            told[name] = ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
        except RayError as error:  # GetTimeoutError is one
            is_late = isinstance(error, ray.exceptions.GetTimeoutError)
            why = f"not done within {seconds:g} s" if is_late else first_line(error)
            told[name] = {"disk": {"why": why}, "device": {"why": why}}
            ray.cancel(answer, force=True)
    return told


def measure_here(folder: str | None, has_gpu: bool) -> dict[str, dict[str, Any]]:
    """The same of this node."""
    disk = {"why": "not asked"} if folder is None else {"folder": folder, **of_disk(folder)}
    return {"disk": disk, "device": of_device() if has_gpu else {"why": "no GPU on this node"}}


def of_disk(folder: str) -> dict[str, Any]:
    """Of a file that is written, forgotten by the system's memory, and read."""
    import torch

    from qlora_ray.model.homes import DiskFile

    try:
        file = DiskFile(folder, NUM_BYTES)
        home = file.put(torch.randint(256, (NUM_BYTES,), dtype=torch.uint8))
        file.forget()
    except ConfigError as error:
        return {"why": str(error)}
    content = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    began = time.perf_counter()
    home.read_into(content)
    return {"bytes_per_second": NUM_BYTES / (time.perf_counter() - began)}


def of_device() -> dict[str, Any]:
    """From locked host memory to the first GPU that this process sees."""
    import torch

    from qlora_ray.model.pinned import host_memory, lock

    memory, taken = host_memory(NUM_BYTES), []
    if code := lock(memory):
        return {"why": f"host memory cannot be locked (CUDA error {code})"}
    there = torch.empty(NUM_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(TIMES):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(memory, non_blocking=True)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return {"bytes_per_second": NUM_BYTES / min(taken)}
