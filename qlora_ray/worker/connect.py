"""How NCCL connects the workers: beside the imports of a start, not at the first collective.

Stands on internals of torch: AT_ONCE.
"""

from qlora_ray.libraries import Patch

AT_ONCE = Patch(
    "torch", "2.13.0", "the default group's backend of a device has eager_connect_single_device, as init_process_group "
    "calls it where it is given a device_id",
    gains="a second of each start: CUDA and NCCL begin while Python imports",
    delete_when="it can be asked of a process group without internals",
)  # fmt: skip


def connect() -> None:
    """Have CUDA, and NCCL between the workers, begin now. For a thread of its own. Every worker must call this.

    Not where rows are long: how memory is allocated is decided before CUDA begins then (worker/setup.py).
    """
    import ray.train.torch
    import torch

    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)  # of this thread
    torch.distributed.distributed_c10d._get_default_group()._get_backend(device).eager_connect_single_device(device)
