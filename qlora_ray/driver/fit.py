"""TorchTrainer.fit in a thread, and what it is given.

Leaves out two of Ray Train's own callbacks: FEWER_CALLBACKS.
"""

import threading
import time
from typing import Any

from qlora_ray.cluster import connect
from qlora_ray.libraries import Patch
from qlora_ray.rundir import names
from qlora_ray.worker.messages import DEATH, Failed, Run

FEWER_CALLBACKS = Patch(
    "ray", "2.60.0", "TorchTrainer._create_default_callbacks leaves out those in NEEDLESS",
    gains="two processes beside the workers: one for data that Ray Train delivers, which is none, and one that asks a "
    "dashboard, which not every cluster runs (see connect.release_workers)",
    delete_when="each starts its process only where there is work for it",
)  # fmt: skip
NEEDLESS = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


class Fit:
    """TorchTrainer.fit in a thread, so that the main thread can listen and be interrupted.

    Ray Train restarts worker groups. When its controller itself dies, a new trainer takes over from our checkpoints.
    """

    def __init__(self, run: Run, channel: Any, network: dict[str, str]):
        self.error: BaseException | None = None
        self._what, self._channel, self._network = run, channel, network
        self._tries_left = 1 + run.config.ray.max_failures
        self._thread = threading.Thread(target=self._run, daemon=True, name="fit")
        self._thread.start()

    def is_running(self) -> bool:
        """Whether Ray Train has not come to an end yet."""
        return self._thread.is_alive()

    def _run(self) -> None:
        from ray.exceptions import RayActorError
        from ray.train import ControllerError, TrainingFailedError

        while self._tries_left:
            self._tries_left -= 1
            try:
                self._make_trainer().fit()
                self.error = None
                return
            except (TrainingFailedError, ControllerError) as error:
                self.error = error
                return
            except RayActorError as error:
                self.error = error
                self._channel.tell.remote(Failed(f"Ray Train's controller {DEATH}"))
                connect.release_workers()

    def _make_trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from qlora_ray.driver.controller import ReportFailures, SaveBeforeResize, WholeGroups
        from qlora_ray.worker import train_worker

        class Trainer(TorchTrainer):
            def _create_default_callbacks(self):
                made = super()._create_default_callbacks()  # type: ignore[misc]  # Ray annotates its old trainer
                return [one for one in made if type(one).__name__ not in NEEDLESS]

            def _initialize_and_run_controller(self, **given):
                if size > 1 and ray_config.min_workers < ray_config.max_workers:
                    given["scaling_policy"] = WholeGroups(self.scaling_config, size)
                return super()._initialize_and_run_controller(**given)  # type: ignore[misc]

        size = self._what.config.training.sequence_parallel
        ray_config, plan, folder = self._what.config.ray, self._what.plan, self._what.folder
        logs = f"{folder.path}/{names.LOGS}" if folder.is_local else None
        # Ray's own bookkeeping gets a fresh name each time: what it leaves behind can never block a run of ours.
        return Trainer(
            train_worker,
            train_loop_config={"run": self._what, "channel": self._channel},
            scaling_config=ScalingConfig(
                num_workers=ray_config.num_workers,  # type: ignore[arg-type]  # Ray annotates its old ScalingConfig
                use_gpu=plan.use_gpu,
                resources_per_worker=plan.resources_per_worker,
                elastic_resize_monitor_interval_s=ray_config.elastic_resize_monitor_interval_s,  # type: ignore[call-arg]
            ),
            run_config=RunConfig(
                name=f"{time.time_ns()}",
                storage_path=f"{folder.path}/.ray",
                storage_filesystem=None if folder.is_local else folder.filesystem,
                failure_config=FailureConfig(max_failures=ray_config.max_failures),
                worker_runtime_env={"env_vars": self._network} if self._network else None,  # type: ignore[call-arg]
                callbacks=[ReportFailures(self._channel, logs), SaveBeforeResize(self._channel)],  # type: ignore[list-item]  # Ray annotates its old Callback
            ),
        )
