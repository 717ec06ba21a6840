"""How the workers find each other: Ray Train's torch backend, without torch in the controller, which computes nothing.

Stands on three functions inside ray.train.torch.config: WITHOUT_TORCH.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

from qlora_ray import collector
from qlora_ray.libraries import Patch

TIMEOUT_SECONDS = 1800  # of the process group, as TorchConfig's
WITHOUT_TORCH = Patch(
    "ray", "2.60.0", "_set_torch_distributed_env_vars, _setup_torch_process_group and _shutdown_torch are called on "
    "the workers as _TorchBackend calls them, and DataParallelTrainer is given this backend",
    gains="the import of torch in Ray Train's controller, a second or two in which no worker starts",
    delete_when="ray.train.torch.config imports torch where it is used",
)  # fmt: skip


class ProcessGroup(BackendConfig):
    """TorchConfig of these workers: gloo on CPUs, NCCL on GPUs."""

    def __init__(self, use_gpu: bool):
        self.backend = "nccl" if use_gpu else "gloo"

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train's controller calls before and after training."""
        return JoinAndLeave

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """What a worker trains in."""
        return on_its_device


class JoinAndLeave(Backend):
    """The process group of a worker group."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:  # type: ignore[override]
        """Ray Train calls this once the workers live."""
        host, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(join, backend_config.backend, host, port)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:  # type: ignore[override]
        """Ray Train calls this before it ends the workers."""
        seconds = float(os.environ.get("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", 30))
        with contextlib.suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(leave, len(worker_group) > 1), timeout=seconds)


@contextlib.contextmanager
def on_its_device() -> Iterator[None]:
    """Within, the worker's GPU is the one that torch takes."""
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


def join(backend: str, host: str, port: int) -> None:
    """Make the process group of all workers. Every worker must call this."""
    import ray.train

    with collector.paused():
        from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    config._setup_torch_process_group(backend, rank, size, "env://", TIMEOUT_SECONDS)


def leave(is_group: bool) -> None:
    """Free what the process group and the GPU hold."""
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=is_group)
