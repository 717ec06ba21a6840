"""A real all-reduce between the nodes: NCCL where they have GPUs, gloo where not, and the bandwidth it reaches."""

import time
from typing import Any

import ray
from ray.exceptions import RayError

from qlora_ray import environment
from qlora_ray.cluster.ask import first_line, nodes_by_name, on_node

NUM_BYTES = {"nccl": 256 * 2**20, "gloo": 16 * 2**20}
TIMES = 5


class Reducer:
    """One process of the group, on one node."""

    def url(self) -> str:
        """Where rank 0 will listen."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return f"tcp://{ray.util.get_node_ip_address()}:{port}"

    def reduce(self, rank: int, size: int, url: str, backend: str, seconds: float) -> float:
        """Seconds of the fastest all-reduce of NUM_BYTES. Every rank must call this. Raises where a sum is wrong."""
        import datetime

        import torch
        import torch.distributed as dist

        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        timeout = datetime.timedelta(seconds=seconds)
        dist.init_process_group(backend, init_method=url, rank=rank, world_size=size, timeout=timeout)
        taken = []
        for _ in range(TIMES):
            values = torch.full((NUM_BYTES[backend] // 4,), float(rank + 1), device=device)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            expected = size * (size + 1) / 2
            if float(values[0]) != expected or float(values[-1]) != expected:  # waits for the device
                raise ArithmeticError(f"the sum of 1 to {size} came out as {float(values[0])}")
            taken.append(time.perf_counter() - began)
        dist.destroy_process_group()
        return min(taken)


def measure(use_gpu: bool, interfaces: dict[str, str], seconds: float) -> dict[str, Any]:
    """Bus bandwidth in bytes per second between all nodes, or why there is none; `interfaces` by node."""
    nodes = {name: node for name, node in nodes_by_name().items() if not use_gpu or node["Resources"].get("GPU")}
    if len(nodes) < 2:
        return {"skipped": "one node: nothing to reduce between nodes"}
    backend = "nccl" if use_gpu else "gloo"
    actor: Any = ray.remote(Reducer)
    deadline = time.monotonic() + seconds
    group = [
        actor.options(**on_node(
            node, num_gpus=1 if use_gpu else 0,
            runtime_env={"env_vars": environment.network([interfaces[name]] if name in interfaces else [])},
        )).remote()
        for name, node in nodes.items()
    ]  # fmt: skip
    try:
        url = ray.get(group[0].url.remote(), timeout=seconds)
        left = max(1.0, deadline - time.monotonic())
        taken = ray.get(
            [one.reduce.remote(rank, len(group), url, backend, left) for rank, one in enumerate(group)], timeout=left
        )
    except RayError as error:  # GetTimeoutError is one
        late = isinstance(error, ray.exceptions.GetTimeoutError)
        return {"why": f"{backend}: {f'not done within {seconds:g} s' if late else first_line(error)}"}
    finally:
        for one in group:
            ray.kill(one)
    # Bus bandwidth as nccl-tests define it: 2 (n - 1) / n bytes cross a link for each byte that is reduced.
    moved = 2 * (len(group) - 1) / len(group) * NUM_BYTES[backend]
    return {"backend": backend, "bytes_per_second": moved / max(taken)}
