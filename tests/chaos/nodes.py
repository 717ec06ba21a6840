"""A Ray cluster of several nodes on this machine: each is a raylet of its own, which can be killed or drained."""

import contextlib
import time
from collections.abc import Iterator

from ray.cluster_utils import Cluster

SLOT = "{CPU: 1, slot: 1}"  # ray.resources_per_worker: a worker lives on a node made by `add`, not on the head


@contextlib.contextmanager
def cluster(num_nodes: int) -> Iterator[Cluster]:
    """A head without slots and `num_nodes` nodes with one; all end with the block."""
    made = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for _ in range(num_nodes):
            add(made)
        yield made
    finally:
        made.shutdown()


def add(made: Cluster, slots: int = 1, **more):
    return made.add_node(num_cpus=slots, resources={"slot": slots}, wait=True, **more)


def drain(made: Cluster, node, seconds: float) -> None:
    """Announce that a node will be taken away, as clouds and Kubernetes do through Ray's autoscaler."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, reason = GcsClient(address=made.address).drain_node(
        node.node_id, autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "test", deadline_ms
    )
    assert accepted, reason
