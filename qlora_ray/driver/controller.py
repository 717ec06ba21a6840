"""What runs in Ray Train's controller: it tells the driver why a worker group failed, and saves before a resize.

On a Ray of the driver's own the controller runs in the driver, else in an actor.
Stands on six of Ray's internals: CAUSES, HOOKS, FRESH_NODES, WHOLE_GROUPS, OWN_MACHINE and IN_THE_DRIVER.
"""

import asyncio
import contextlib
import logging
import re
import time
from pathlib import Path
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from qlora_ray.libraries import Patch
from qlora_ray.worker.messages import DEATH, FREEZE, Failed

CAUSES = Patch(
    "ray", "2.60.0", "health_check_failure, _base_exc and the name WorkerHealthCheckTimeoutError are read from errors",
    gains="the cause of a failure in one line: what a worker raised, that it died, or that it froze",
    delete_when="ray.train exports these exceptions with what they wrap",
)  # fmt: skip
HOOKS = Patch(
    "ray", "2.60.0", "SaveBeforeResize is a ControllerCallback and a WorkerGroupCallback",
    gains="a checkpoint before Ray Train replaces a worker group by a larger one, which it does without a word to it",
    delete_when="UserCallback tells of a resize before it is done",
)  # fmt: skip
FRESH_NODES = Patch(
    "ray", "2.60.0", "the autoscaling coordinator, which Ray Train asks for nodes, is told to look at them anew",
    gains="up to 20 s of a node failure, in which the new group waits for a node that is gone",
    delete_when="Ray Train does so itself after a failure",
)  # fmt: skip

WHOLE_GROUPS = Patch(
    "ray", "2.60.0", "ElasticScalingPolicy._count_possible_workers is rounded down, and the trainer's own call of "
    "_initialize_and_run_controller is given that policy",
    gains="training.sequence_parallel with [min, max] workers: never as many as make no whole groups",
    delete_when="ScalingConfig takes a number that workers must be a multiple of",
)  # fmt: skip
OWN_MACHINE = Patch(
    "ray", "2.60.0", "FixedScalingPolicy registers nowhere: after_controller_start and _maybe_send_resource_request do "
    "nothing, and the trainer's own call of _initialize_and_run_controller is given that policy",
    gains="a process of the autoscaling coordinator, which starts before any worker does: two seconds on two cores",
    delete_when="Ray Train asks no autoscaler where none runs",
)  # fmt: skip
IN_THE_DRIVER = Patch(
    "ray", "2.60.0", "TrainController is made and run by the trainer's own _initialize_and_run_controller, with a "
    "worker_group_cls whose _init_train_context_on_workers names no actor as the controller",
    gains="a process that starts and imports before any worker does: two seconds on two cores",
    delete_when="Ray Train can run its controller in the process that asks for it",
)  # fmt: skip
COLLATERAL = re.compile(r"connection (closed|reset)|connection refused|timed out|NCCL|gloo|aborted", re.IGNORECASE)
SAVE_TIMEOUT_SECONDS = 60  # after that, the group is replaced as Ray Train does without us: its last checkpoint counts
COORDINATOR_TIMEOUT_SECONDS = 5


class ReportFailures(UserCallback):
    """Sends each failure of a worker group to the channel, with its likely cause."""

    def __init__(self, channel: Any, log_folder: str | None):
        self._channel, self._log_folder = channel, log_folder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this when workers have failed: tell the driver why, unless it was announced."""
        if not any(map(_was_preempted, worker_exceptions.values())):  # announced: see worker/notice.py
            self._channel.tell.remote(Failed(self._cause(worker_exceptions)))

    def _cause(self, errors: dict[int, Exception]) -> str:
        stuck = self._take_stacks()
        if stuck:
            return f"stuck: {', '.join(f'worker {rank}' for rank in stuck)}; stacks in logs/"
        return likely_cause(errors)

    def _take_stacks(self) -> list[int]:
        """Ranks whose watchdog has fired since the last failure; their stacks are moved into their logs."""
        fired = []
        for path in sorted(Path(self._log_folder).glob("stacks_*.log")) if self._log_folder else []:
            if stacks := path.read_text(errors="replace"):
                rank = int(path.stem.removeprefix("stacks_"))
                with open(path.with_name(f"worker_{rank}.log"), "a") as log:
                    log.write(stacks)
                path.write_text("")
                fired.append(rank)
        return fired


def likely_cause(errors: dict[int, Exception]) -> str:
    """One line: the failure that others follow from. Deaths first, then errors that are no broken connection."""
    causes = {rank: _describe(error) for rank, error in sorted(errors.items())}
    for end in (FREEZE, DEATH):
        if ranks := [rank for rank, cause in causes.items() if cause == end]:
            return f"{', '.join(f'worker {rank}' for rank in ranks)} {end}"
    own = {rank: cause for rank, cause in causes.items() if not COLLATERAL.search(cause)}
    if not own:
        return f"worker {next(iter(causes))} lost its connection to another worker"
    rank, cause = next(iter(own.items()))
    return f"worker {rank}: {cause}"


def _was_preempted(error: Exception) -> bool:
    inner = getattr(error, "health_check_failure", None) or error
    return isinstance(inner, RayActorError) and inner.preempted


def _describe(error: Exception) -> str:
    inner = getattr(error, "health_check_failure", None) or getattr(error, "_base_exc", error)
    if isinstance(inner, RayActorError):
        return DEATH
    if type(inner).__name__ == "WorkerHealthCheckTimeoutError":
        return FREEZE
    text = str(inner).strip()
    return f"{type(inner).__name__}: {text.splitlines()[0] if text else ''}"


class WholeGroups(ElasticScalingPolicy):
    """As many workers as there is room for, and as make whole groups of `size`."""

    def __init__(self, scaling_config: Any, size: int):
        super().__init__(scaling_config)
        self._size = size

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return possible // self._size * self._size


class OwnMachine(FixedScalingPolicy):
    """As many workers as fit a machine of our own: nobody else asks for its room, and nothing can be added to it."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray Train calls this to have room kept."""

    def _maybe_send_resource_request(self) -> None:
        pass


class OwnGroup(WorkerGroup):
    """Workers whose controller is no actor: they would ask it for checkpoints reported to it, and ours report none."""

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: dict[str, Any]) -> None:
        import ray

        given = {
            "train_run_context": self._train_run_context, "synchronization_actor": sync_actor, "controller_actor": None,
            "storage_context": self._storage_context, "worker_callbacks": self._worker_callbacks_to_propagate,
        }  # fmt: skip
        ray.get([
            worker.actor.init_train_context.remote(
                **given, distributed_context=worker.distributed_context,
                **{name: values[place] for name, values in train_context_args.items()},
            )
            for place, worker in enumerate(workers)
        ])  # fmt: skip
        self._decorate_worker_log_file_paths(workers)

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env  # theirs is this process's already: cluster/connect.py


class OwnController(TrainController):
    """Ray Train's controller in the process and thread that calls `run_here`."""

    worker_group_cls = OwnGroup


def run_here(given: dict[str, Any]) -> Any:
    """What DataParallelTrainer has an actor do: control a run from beginning to end, and return its result."""
    controller = OwnController(**given)
    if not logging.getLogger("ray").isEnabledFor(logging.INFO):  # its files in Ray's own folder have all of it
        logger = logging.getLogger("ray.train")
        logger.handlers = [one for one in logger.handlers if not isinstance(one, logging.StreamHandler)]
    asyncio.run(controller.run())
    return controller.get_result()


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Has a running worker group save a checkpoint before Ray Train replaces it by a larger one."""

    def __init__(self, channel: Any):
        self._channel, self._num_workers, self._is_running = channel, 0, False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Ray Train calls this when a group trains: note its size."""
        self._is_running, self._num_workers = True, len(worker_group)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """The group is lost, perhaps with its node: have Ray look now which nodes are left, not every 20 s."""
        import ray
        from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

        self._is_running = False
        with contextlib.suppress(GetTimeoutError, RayActorError):  # then it looks later
            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=COORDINATOR_TIMEOUT_SECONDS)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Ray Train calls this before it ends a group for one of another size: wait until that has saved."""
        import ray

        if not self._is_running:
            return
        self._is_running = False
        change = f"going from {self._num_workers} to {resize_decision.num_workers} workers"
        with contextlib.suppress(GetTimeoutError, RayActorError):
            ray.get(self._channel.hold.remote(change), timeout=COORDINATOR_TIMEOUT_SECONDS)
            deadline = time.monotonic() + SAVE_TIMEOUT_SECONDS
            while time.monotonic() < deadline and not ray.get(self._channel.is_holding.remote(), timeout=5):
                time.sleep(0.1)
