"""One Ray Train worker's life."""


def train_worker(job: dict) -> None:
    """What Ray Train calls on each worker. Imports late, so that the controller process stays light."""
    import os

    if not job["plan"].use_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else DeepSpeed takes a GPU that it sees for the workers' device
    # bitsandbytes wraps helpers in torch.compile, which imports a compiler for a second; nothing here is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from qlora_ray.worker.loop import run

    run(**job)
