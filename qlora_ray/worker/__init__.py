"""One Ray Train worker's life."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_ray.config import Config
    from qlora_ray.model.facts import ModelFacts
    from qlora_ray.worker.messages import Refused

POLL_SECONDS = 0.05


def train_worker(job: dict[str, Any]) -> None:
    """What Ray Train calls on each worker, with what it needs (driver/fit.py) and a `channel`, which has the run.

    That may still be planned: a worker imports what it needs meanwhile, and rank 0 measures the base of the config
    that `measures` may hold, by which the driver plans.
    Imports late: the controller process stays light, and a group that should not start ends at once.
    """
    import os

    import ray
    import ray.train

    from qlora_ray import collector, laps
    from qlora_ray.worker.connect import connect
    from qlora_ray.worker.messages import Fatal

    channel = job["channel"]
    if reason := ray.get(channel.reason_to_give_up.remote(), timeout=60):
        ray.get(channel.tell.remote(Fatal(reason)), timeout=60)
        return
    run, is_called_off = ray.get(channel.wanted.remote(), timeout=60)
    if is_called_off:
        return
    if not job["use_gpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else DeepSpeed takes a GPU that it sees for the workers' device
    # bitsandbytes wraps helpers in torch.compile, which imports a compiler for a second; nothing here is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    laps.begin()
    connected = ThreadPoolExecutor(1).submit(connect) if job["connects_early"] else None
    with laps.part("imports"), collector.paused():
        from qlora_ray.worker import losses

        losses.load()
        from qlora_ray.worker.loop import run_worker

    is_asked = run is None and job["measures"] and ray.train.get_context().get_world_rank() == 0
    measured = _measure(job["measures"]) if is_asked else None
    # A run that is called off meanwhile may have workers that do not connect any more: nobody waits for them.
    while not is_called_off and (run is None or connected and not connected.done()):
        time.sleep(POLL_SECONDS)
        run, is_called_off = ray.get(channel.wanted.remote(measured), timeout=60)
    if is_called_off:
        return
    if connected:
        connected.result()
    run_worker(run, channel)


def _measure(config: "Config") -> "ModelFacts | Refused":
    """What the base and its adapter will hold, or why they cannot be built."""
    from qlora_ray import laps
    from qlora_ray.errors import ConfigError
    from qlora_ray.planning.early import exact_facts
    from qlora_ray.worker.messages import Refused

    try:
        with laps.part("sizes of the base"):
            return exact_facts(config)
    except ConfigError as refusal:
        return Refused(str(refusal))
