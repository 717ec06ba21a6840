"""One Ray Train worker's life."""

import time
from typing import Any

POLL_SECONDS = 0.05


def train_worker(job: dict[str, Any]) -> None:
    """What Ray Train calls on each worker, with `use_gpu` and `channel` (driver/channel.py), which has the run.

    That may still be planned: a worker imports what it needs meanwhile.
    Imports late: the controller process stays light, and a group that should not start ends at once.
    """
    import os

    import ray

    from qlora_ray import laps
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
    with laps.part("imports"):
        from qlora_ray.worker.loop import run_worker

    while run is None and not is_called_off:
        time.sleep(POLL_SECONDS)
        run, is_called_off = ray.get(channel.wanted.remote(), timeout=60)
    if not is_called_off:
        run_worker(run, channel)
