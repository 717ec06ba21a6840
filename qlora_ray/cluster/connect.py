"""Connects to the Ray cluster of a run, or starts a private one, and has its processes ready when they are needed.

Stands on four of Ray's internals: SETTINGS, ADDRESS, OWN_PROCESSES and GROUPS_OF_JOB.
"""

import contextlib
import logging
import os
import signal
from typing import Any

from qlora_ray import environment
from qlora_ray.cluster import authentication
from qlora_ray.cluster.few_processes import few_processes
from qlora_ray.config import Config
from qlora_ray.errors import ConfigError, ProcessDied
from qlora_ray.libraries import Patch
from qlora_ray.planning.hardware import Hardware

VITAL = {"raylet", "gcs_server"}

SETTINGS = Patch(
    "ray", "2.60.0", "environment variables that Ray's code reads and its documentation does not name",
    gains="a failure is seen within half a second, a notice of a node within one, and a lost node is not waited for",
    delete_when="each has a documented setting",
)  # fmt: skip
ADDRESS = Patch(
    "ray", "2.60.0", "ray._private.services.canonicalize_bootstrap_address finds the cluster of this machine",
    gains="a cluster that takes commands from anyone is refused before ray.init has sent it anything",
    delete_when="ray.init refuses such a cluster, or says which it would take",
)  # fmt: skip
OWN_PROCESSES = Patch(
    "ray", "2.60.0", "ray._private.worker._global_node.dead_processes() is asked",
    gains="a run whose private Ray has died ends with that reason, and does not hang",
    delete_when="Ray tells its driver that its head is gone",
)  # fmt: skip
GROUPS_OF_JOB = Patch(
    "ray", "2.60.0", "the id of a placement group ends with that of its job (ray/common/id.h)",
    gains="what a dead controller's workers held is freed, and what other runs hold is not",
    delete_when="placement_group_table names the job, or Ray frees the groups of a detached actor that died",
)  # fmt: skip
NUM_BESIDE = 2  # actors beside the workers: our channel, and Ray Train's of reports


def set_environment(config: Config, debug: bool) -> None:
    """Settings that Ray and others read from the environment when they start."""
    settings = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how soon a report is taken (default 2 s)
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{config.watchdog.frozen_seconds:g}",
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # of the surviving workers of a group (default 30)
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if not address(config):  # nobody drains the only node
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    elif config.ray.min_workers < config.ray.max_workers:  # a node that is gone is not waited for long
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if debug:
        os.environ |= {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "TRANSFORMERS_VERBOSITY": "info"}
    # Ray does so too, but only if nobody has imported it before.
    if address(config) == "auto" and "RAY_AUTH_MODE" not in os.environ and authentication.token():
        os.environ["RAY_AUTH_MODE"] = "token"


def address(config: Config) -> str | None:
    """Where the cluster is, "auto" for the one of this machine; None for a private Ray."""
    return environment.ray_address(config.ray.address)


def start_ray(config: Config, debug: bool) -> Hardware:
    """Connect to the cluster, or start a private Ray on this machine; returns its Hardware.

    Raises ConfigError, and ProcessDied where a Ray of our own does not start.
    """
    authentication.keep_token_private()
    where = address(config)
    if where:
        authentication.check_cluster(_resolved(where), config.ray.allow_unauthenticated)
    import ray

    cores = len(os.sched_getaffinity(0))
    # One CPU more than there are cores, for the data tasks: Ray Data starts none where the workers hold every CPU.
    private: dict[str, Any] = {} if where else {"num_cpus": cores + 1, "include_dashboard": False}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // config.ray.max_workers)))
    # Processes of a private Ray have the environment of this one: those that wait for work are then any actor's.
    own = contextlib.ExitStack()
    if not where:
        own.enter_context(few_processes(shows_logs=debug, num_early=config.ray.max_workers + NUM_BESIDE))
        own.enter_context(environment.changed(OMP_NUM_THREADS=threads))
    try:
        with own:
            ray.init(
                address=where or "local",  # without it Ray would join any cluster that someone started here
                log_to_driver=debug,
                logging_level=logging.INFO if debug else logging.ERROR,
                runtime_env={"env_vars": environment.carried(os.environ)} if where else None,
                **private,
            )
    except ConnectionError as error:
        raise ConfigError(f"ray.address={where}: no Ray cluster answers there: {error}") from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise ConfigError(
            f"ray.address={where}: the cluster runs other versions than this machine. "
            f"{' '.join(str(error).split())} Install the same on both, or submit the run as a Ray job."
        ) from error
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray gives it no kind of its own
            raise
        raise ProcessDied(
            "Ray did not start on this machine in 30 s: its cores are busy with something else, or a process of Ray "
            "died (logs: /tmp/ray/session_latest/logs). Try again once there is less load."
        ) from error
    # Ray has put its own handler there, which prints a stack and dies.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    total = ray.cluster_resources()
    accelerators = tuple(name.split(":", 1)[1] for name in total if name.startswith("accelerator_type:"))
    cpus = cores if not where else total.get("CPU", 0) - 1  # the data tasks' one
    nodes = tuple(dict(node["Resources"]) for node in ray.nodes() if node["Alive"])
    return Hardware(cpus, total.get("GPU", 0), accelerators, dict(total), nodes)


def _resolved(where: str) -> str:
    """host:port of the cluster that Ray would take. Raises ConfigError."""
    if where != "auto":
        return where
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if found is None:
        raise ConfigError("ray.address=auto: no Ray runs on this machine. Start one with `ray start`, or leave it out.")
    return found


def dead_processes() -> list[str]:
    """Names of processes of the private Ray that have died; with them, nothing can go on for long."""
    from ray._private import worker

    node = worker._global_node  # None where the cluster is not ours
    return [name for name, _ in node.dead_processes() if name in VITAL] if node and node.is_head() else []


def release_workers() -> None:
    """Free what the workers of a dead Ray Train controller hold, or the next would wait for their CPUs for ever.

    Ray Train's own cleaner asks the dashboard, which not every cluster runs.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))
