"""Tokenizes the chunks of a large source at once: on this machine's cores, or as Ray Data tasks over a cluster.

Chunks are written where they are made; nothing but counts and lengths comes back.
"""

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from qlora_ray.data.read import Chunk
from qlora_ray.data.work import Done, Recipe, encoder_of, encoder_with, tokenize_chunk
from qlora_ray.errors import ProcessDied
from qlora_ray.storage import Folder

MOST_PROCESSES = 32  # each holds a tokenizer and a chunk: about half a GiB
OBJECTS_PER_COLLECTION = 100_000


def run_on_cores(chunks: list[Chunk], recipe: Recipe, entry: Folder) -> Iterator[tuple[int, Done]]:
    """(chunk number, what is known of it) for each chunk, as they end: a process for each core of this machine.

    Raises ConfigError for a tokenizer that cannot be loaded, ProcessDied where a process ends before its chunk, and
    the OSError of one that cannot read or write.
    """
    context = multiprocessing.get_context("spawn")
    count = min(len(chunks), len(os.sched_getaffinity(0)), MOST_PROCESSES)
    with contextlib.ExitStack() as stack:
        busy: dict[Connection, Any] = {}  # by our end of its pipe
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_tokenize_as_told, args=(theirs, recipe, entry), daemon=True)
            process.start()
            theirs.close()  # only the process has it now: where either ends, the other reads the end of the pipe
            stack.callback(_end, process, ours)
            busy[ours] = process
        tokenizer = encoder_of(recipe).tokenizer  # one that cannot be loaded is told here, not from there
        left = iter(enumerate(chunks))
        for pipe in busy:
            _send(pipe, None if recipe.trust_remote_code else tokenizer)  # a class of the base's own is known only here
            _send(pipe, next(left))
        while busy:
            for pipe in (one for one in wait(list(busy)) if isinstance(one, Connection)):
                try:
                    done = pipe.recv()
                except (EOFError, ConnectionResetError):  # the latter where it left a chunk unread
                    busy[pipe].join()
                    raise ProcessDied(
                        f"a process that tokenizes ended with exit code {busy[pipe].exitcode}"
                        f"{' (killed, maybe for its memory)' if busy[pipe].exitcode == -signal.SIGKILL else ''}."
                    ) from None
                if isinstance(done, OSError):  # a full disk, say
                    raise done
                following = next(left, None)
                if following is None:
                    del busy[pipe]
                else:
                    _send(pipe, following)
                yield done


def _send(pipe: Connection, what: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the other end is gone: who reads next sees it
        pipe.send(what)


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    process.terminate()
    process.join()


def _tokenize_as_told(pipe: Connection, recipe: Recipe, entry: Folder) -> None:
    """Tokenize the chunks that come, until none does or the process that sends them is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores have a process each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it comes to all; the driver ends this process
    import transformers  # noqa: F401, while the driver loads the tokenizer, which takes longer: it needs torch for it

    with contextlib.suppress(EOFError):
        tokenizer = pipe.recv()
        encoder = encoder_of(recipe) if tokenizer is None else encoder_with(tokenizer, recipe)
        # Records make many objects and no circles: looking for circles took a quarter of the time.
        gc.freeze()
        gc.set_threshold(OBJECTS_PER_COLLECTION)
        while True:
            number, chunk = pipe.recv()
            done: Any
            try:
                done = number, tokenize_chunk(chunk, recipe, entry, number, encoder)
            except OSError as error:
                done = error
            _send(pipe, done)


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
