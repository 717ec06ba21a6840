"""Other numbers of workers without lost steps. Runs in Ray Train's controller."""

import contextlib
import time
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

SAVE_TIMEOUT_SECONDS = 60  # after that, the group is replaced as Ray Train does without us: its last checkpoint counts
COORDINATOR_TIMEOUT_SECONDS = 5


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Has a running worker group save a checkpoint before Ray Train replaces it by a larger one.

    Ray Train ends the group without a word to it (ray/train/v2/_internal/execution/controller/controller.py).
    """

    def __init__(self, channel: Any):
        self._channel, self._num_workers, self._is_running = channel, 0, False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
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
