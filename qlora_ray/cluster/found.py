"""What the checks are given and what they say: facts in, rows of red and green out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_ray.planning.offload import Passing


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    node: str
    state: Literal["ok", "bad", "unknown"]
    found: str
    todo: str = ""  # of a line that is not green


@dataclass(frozen=True)
class Needs:
    """What the run will want."""

    use_gpu: bool
    compute_dtype: str
    num_workers: int
    worker_gib: float | None  # of GPU memory; None: not known
    storage_bytes: int
    object_store_bytes: int  # of a node's rows that wait to be trained on
    row_parts: int = 1  # workers that hold each row together
    sharing: str = ""  # what these hold and send; "": not known
    unfit: str = ""  # why the cluster cannot hold the workers; "": it can
    passing: Passing | None = None  # the layers' weights, where they are offloaded
    gathered_per_second: float | None = None  # bytes of the base that a worker gets from others; None: not known


@dataclass(frozen=True)
class Found:
    """What is known of the cluster."""

    driver: dict[str, Any]
    nodes: dict[str, dict[str, Any]]  # facts by node
    needs: Needs
    resources: dict[str, dict[str, float]] = field(default_factory=dict)  # Ray's, by node
    silent: dict[str, str] = field(default_factory=dict)  # why a node gave no facts
    authentication: str = "private"  # or an answer of authentication.ask
    token_mode: int | None = None  # of the token file
    all_reduce: dict[str, Any] | None = None
    bandwidth: dict[str, dict[str, Any]] = field(default_factory=dict)  # by node: of its disk, and to its GPU
    stop_seconds: int | None = None  # in a Ray job, what `ray job stop` grants


Check = Callable[[Found], Iterable[Row]]


def look(found: Found, checks: Iterable[Check]) -> list[Row]:
    """The rows of these checks, in their order."""
    return [row for check in checks for row in check(found)]
