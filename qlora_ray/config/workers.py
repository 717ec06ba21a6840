"""Workers: how many, where, and how base and optimizer are spread over them."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from qlora_ray.config.section import Section
from qlora_ray.environment import hide_secrets

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class DeepSpeedConfig(Section):
    """How base and optimizer are spread over the workers."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = 3
    """ZeRO stage: 3 shards the 4-bit base over the workers; auto: 3 with several workers, 0 with one."""
    share_base: Literal["auto", "replicate", "node", "world"] = "auto"
    """How workers hold the 4-bit base at stage 3: replicate: each all of it, and no weights travel; node: those of a
    node hold it together, and no weights travel between nodes; world: all hold it together. auto: the first of these
    that fits every GPU with activations. The same bits in all."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Keep the layers' weights in each worker's host memory, or on a local disk (nvme), and bring them to the GPU one
    layer after the other while it computes (stage 3). Free GPU memory keeps the last layers."""
    nvme_path: str | None = None
    """A folder on a local disk of every node, for offload_params: nvme. The file there is gone when the run ends."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep the optimizer state in host memory."""
    config_file: str | None = None
    """DeepSpeed JSON merged over the plan: "auto" values are filled in, explicit ones win (also --deepspeed)."""


class RayConfig(Section):
    """Workers, cluster, and where run directories go: [cluster.md](cluster.md)."""

    address: str | None = None
    """Address of a running cluster ("auto" inside one); default: a private Ray on this machine."""
    allow_unauthenticated: bool = False
    """Connect to a cluster of other machines though it asks for no token. Only on a network closed to others."""
    num_workers: int | tuple[int, int] = 1
    """Ray Train workers, one GPU each (or CPU shares). The ZeRO group is all of them. [min, max]: as many as there is
    room for, more or fewer as nodes come and go; the result does not depend on how many
    (on CPUs with one and the same OMP_NUM_THREADS)."""
    elastic_resize_monitor_interval_s: float = Field(30, gt=0)
    """Seconds between looks for room for more workers, with [min, max]."""
    use_gpu: bool | Literal["auto"] = "auto"
    """auto: if the cluster has any."""
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Ray resources of one worker; default one CPU, and one GPU where GPUs are used."""
    storage_path: str = "runs"
    """Where run directories go: a folder (shared by all nodes) or a pyarrow URI such as s3://bucket/runs."""
    run_name: str | None = Field(None)
    """Name of the run directory; default: the config's name and the time."""
    max_failures: int = Field(3, ge=0)
    """Restarts from the last checkpoint after a failure. One that repeats without progress ends the run after three."""

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that there may be."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_a_number_or_a_range(cls, num_workers):
        ends = num_workers if isinstance(num_workers, list | tuple) else [num_workers] * 2
        numbers = [int(end) for end in ends if re.fullmatch(r"[1-9]\d*", str(end))]
        if len(numbers) != 2 or len(ends) != 2 or numbers[0] > numbers[1]:
            raise ValueError("must be a number of at least 1, or [min, max]")
        return tuple(numbers) if isinstance(num_workers, list | tuple) else numbers[0]

    @field_validator("storage_path", "address")
    @classmethod
    def _holds_no_password(cls, value):
        if value and hide_secrets(value) != value:
            raise ValueError("must hold no key or password: it would stand in logs. Set it in the nodes' environment")
        return value

    @field_validator("run_name")
    @classmethod
    def _run_name_is_a_plain_name(cls, name):
        if name is not None and not re.fullmatch(RUN_NAME, name):
            raise ValueError("must be 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit")
        return name
