"""One Ray Train worker's life."""


def train_worker(job: dict) -> None:
    """What Ray Train calls on each worker. Imports late, so that the controller process stays light."""
    from qlora_ray.worker.loop import run

    run(**job)
