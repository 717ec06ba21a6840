"""One Ray Train worker's life."""

from typing import Any


def train_worker(job: dict[str, Any]) -> None:
    """What Ray Train calls on each worker, with `run` (messages.Run) and `channel` (driver/channel.py).

    Imports late: the controller process stays light, and a group that should not start ends at once.
    """
    import os

    import ray

    from qlora_ray import laps
    from qlora_ray.worker.messages import Fatal

    run, channel = job["run"], job["channel"]
    if reason := ray.get(channel.reason_to_give_up.remote(), timeout=60):
        ray.get(channel.tell.remote(Fatal(reason)), timeout=60)
        return
    if not run.plan.use_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else DeepSpeed takes a GPU that it sees for the workers' device
    # bitsandbytes wraps helpers in torch.compile, which imports a compiler for a second; nothing here is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    laps.begin()
    with laps.part("imports"):
        from qlora_ray.worker.loop import run_worker

    run_worker(run, channel)
