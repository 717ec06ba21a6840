"""Tokenizes the chunks of a large source as Ray Data tasks: parallel over the cluster, nothing through the driver."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from qlora_ray.data.read import Chunk
from qlora_ray.data.work import Done, Recipe, encoder_of, tokenize_chunk
from qlora_ray.storage import Folder


def run_on_ray(chunks: list[Chunk], recipe: Recipe, entry: Folder) -> Iterator[tuple[int, Done]]:
    """(chunk number, what is known of it) for each chunk, as they end. Ray must have started."""
    import ray.data

    encoder_of(recipe)  # a tokenizer that cannot be loaded is told here, not from inside a task
    quiet_ray_data()
    numbers = ray.data.range(len(chunks), override_num_blocks=len(chunks))
    task: Any = _tokenize_chunks
    done = numbers.map_batches(
        task, fn_args=(ray.put(chunks), recipe, entry), batch_size=None, batch_format="numpy", num_cpus=1,
        **_where_the_files_are(chunks),
    )  # fmt: skip
    for batch in done.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
        yield from zip(batch["number"].tolist(), batch["done"], strict=True)


def quiet_ray_data() -> None:
    """No progress bars and chatter on the terminal."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _tokenize_chunks(batch: dict[str, np.ndarray], chunks: Any, recipe: Recipe, entry: Folder) -> dict[str, np.ndarray]:
    import ray

    every_chunk = ray.get(chunks)
    done = np.empty(len(batch["id"]), object)
    for i, number in enumerate(batch["id"].tolist()):
        done[i] = tokenize_chunk(every_chunk[number], recipe, entry, number)
    return {"number": batch["id"], "done": done}


def _where_the_files_are(chunks: list[Chunk]) -> dict[str, Any]:
    """Files on the driver's disk are read on its node, if that gives CPUs; else every node must see them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    has_cpus = any(node["NodeID"] == here and node["Resources"].get("CPU", 0) >= 1 for node in nodes)
    if len(nodes) > 1 and has_cpus and any(chunk.file.is_local for chunk in chunks):
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    return {}
