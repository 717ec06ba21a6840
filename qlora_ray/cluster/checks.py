"""Which checks there are: facts of each node in, rows of red and green out."""

from qlora_ray.cluster import of_bandwidth, of_cluster, of_nodes
from qlora_ray.cluster.found import Check

CHECKS: tuple[Check, ...] = (
    of_cluster.answers, of_nodes.versions, of_nodes.gpus, of_nodes.cuda, of_nodes.bfloat16, of_cluster.network,
    of_cluster.all_reduce, of_bandwidth.host_to_gpu, of_bandwidth.disk_speed,
    of_cluster.shared_rows, of_cluster.shared_storage, of_cluster.disk,
    of_cluster.shared_memory, of_cluster.cpus,
    of_nodes.base_model, of_nodes.compilers, of_nodes.clocks, of_cluster.authentication, of_nodes.open_files,
    of_cluster.job_stop,
)  # fmt: skip
# What `train` refuses by itself. The others are refused there in their own places, or cost a run only time.
QUICK: tuple[Check, ...] = (
    of_nodes.versions, of_nodes.cuda, of_nodes.bfloat16, of_cluster.shared_storage, of_nodes.base_model,
    of_nodes.compilers, of_nodes.clocks, of_cluster.shared_memory, of_nodes.open_files, of_cluster.job_stop,
)  # fmt: skip
