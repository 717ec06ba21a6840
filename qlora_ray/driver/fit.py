"""Ray Train's fit in a thread, and what it is given; on a Ray of our own with its controller in that thread.

Leaves out two of Ray Train's own callbacks: FEWER_CALLBACKS.
"""

import threading
import time
from contextlib import ExitStack
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora_ray.cluster import connect
from qlora_ray.cluster.scratch import scratch
from qlora_ray.config import Config
from qlora_ray.driver.channel import Channel
from qlora_ray.errors import ConfigError, ProcessDied
from qlora_ray.libraries import Patch
from qlora_ray.model.facts import ModelFacts
from qlora_ray.model.recompute import LONG_ROW
from qlora_ray.planning.hardware import Hardware, check_workers_fit, most_workers, resources_of_a_worker, uses_gpu
from qlora_ray.rundir import names
from qlora_ray.storage import Folder
from qlora_ray.worker.messages import DEATH, Failed, Refused

FEWER_CALLBACKS = Patch(
    "ray", "2.60.0", "DataParallelTrainer._create_default_callbacks leaves out those in NEEDLESS",
    gains="two processes beside the workers: one for data that Ray Train delivers, which is none, and one that asks a "
    "dashboard, which not every cluster runs (see connect.release_workers)",
    delete_when="each starts its process only where there is work for it",
)  # fmt: skip
CALL_OFF_SECONDS = 60
POLL_SECONDS = 0.1
NEEDLESS = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


class Fit:
    """Ray Train's fit in a thread, so that the main thread can plan the run, listen and be interrupted.

    Its workers import what they need and wait until the channel has a run for them, or `call_off` says that there will
    be none. Ray Train restarts worker groups. When its controller itself dies, a new trainer takes over from our
    checkpoints.
    """

    def __init__(
        self, config: Config, hardware: Hardware, folder: Folder, network: dict[str, str], measures: bool = False
    ):  # fmt: skip
        """`folder` is the run directory; `network` tells the workers which interface to use, as variables.

        `measures`: whether `measured` will be asked. Raises ConfigError for more workers than there is room for: they
        would be waited for.
        """
        self.error: BaseException | None = None
        self.began = time.time()
        self._config, self._folder, self._network, self._measures = config, folder, network, measures
        self._use_gpu = uses_gpu(config, hardware)
        self._is_private = connect.address(config) is None
        self._resources = resources_of_a_worker(config, self._use_gpu)
        check_workers_fit(config, self._resources, hardware)
        self._num_workers = most_workers(config, self._resources, hardware)
        self._tries_left = 1 + config.ray.max_failures
        # What Ray Train keeps is never needed again: on one node it need not lie in the run directory.
        self._at_the_end = ExitStack()
        self._own = self._at_the_end.enter_context(scratch("qlora_ray_fit_")) if self._is_private else None
        # On the driver's own node: what is known of a run must not go with a worker's.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.channel: Any = Channel.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # what ray.remote makes of the class
        self._thread = threading.Thread(target=self._run, daemon=True, name="fit")
        self._thread.start()

    def is_running(self) -> bool:
        """Whether Ray Train has not come to an end yet."""
        return self._thread.is_alive()

    def measured(self) -> ModelFacts:
        """What the base and its adapter hold, once a worker has imported all that it takes to say.

        Raises ConfigError as planning/early.py's exact_facts, and ProcessDied where the workers ended before.
        """
        while self.is_running():
            found = ray.get(self.channel.measured.remote(), timeout=60)
            if isinstance(found, Refused):
                raise ConfigError(found.reason)
            if found is not None:
                return found
            time.sleep(POLL_SECONDS)
        raise ProcessDied(f"The workers ended before the base was measured: {self.error}")

    def call_off(self) -> None:
        """Nothing will be trained: wait for the end of the workers, since Ray must outlive the thread that asks it."""
        self._tries_left = 0
        self.channel.call_off.remote()
        self._thread.join(CALL_OFF_SECONDS)

    def _run(self) -> None:
        from ray.exceptions import RayActorError
        from ray.train import ControllerError, TrainingFailedError

        while self._tries_left > 0:
            trainer = self._make_trainer()
            if self._tries_left == 0:  # called off meanwhile
                break
            self._tries_left -= 1
            try:
                trainer.fit()
                self.error = None
                break
            except (TrainingFailedError, ControllerError) as error:
                self.error = error
                break
            except RayActorError as error:
                self.error = error
                if self._tries_left > 0:
                    self.channel.tell.remote(Failed(f"Ray Train's controller {DEATH}"))
                    connect.release_workers()
        self._at_the_end.close()

    def _make_trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from qlora_ray.driver.controller import OwnMachine, ReportFailures, SaveBeforeResize, WholeGroups, run_here
        from qlora_ray.driver.process_group import ProcessGroup
        from qlora_ray.worker import train_worker

        class Trainer(DataParallelTrainer):
            def _create_default_callbacks(self):
                made = super()._create_default_callbacks()  # type: ignore[misc]  # Ray annotates its old trainer
                return [one for one in made if type(one).__name__ not in NEEDLESS]

            def _initialize_and_run_controller(self, **given):
                if is_private:
                    return run_here(given | {"scaling_policy": OwnMachine(self.scaling_config)})  # type: ignore[arg-type]  # Ray annotates its old ScalingConfig
                if size > 1 and ray_config.min_workers < ray_config.max_workers:
                    given["scaling_policy"] = WholeGroups(self.scaling_config, size)
                return super()._initialize_and_run_controller(**given)  # type: ignore[misc]

        size, ray_config, folder = self._config.training.sequence_parallel, self._config.ray, self._folder
        logs, is_private = f"{folder.path}/{names.LOGS}" if folder.is_local else None, self._is_private
        callbacks = [ReportFailures(self.channel, logs), *([] if is_private else [SaveBeforeResize(self.channel)])]
        # Ray's own bookkeeping gets a fresh name each time: what it leaves behind can never block a run of ours.
        return Trainer(
            train_worker,
            backend_config=ProcessGroup(self._use_gpu),
            train_loop_config={
                "use_gpu": self._use_gpu,
                # Where rows are long, workers decide first how memory is allocated (worker/setup.py).
                "connects_early": self._use_gpu and self._config.training.max_length <= LONG_ROW,
                "channel": self.channel,
                "measures": self._config if self._measures else None,
            },
            scaling_config=ScalingConfig(
                num_workers=self._num_workers if is_private else ray_config.num_workers,  # type: ignore[arg-type]  # Ray annotates its old ScalingConfig
                use_gpu=self._use_gpu,
                resources_per_worker=self._resources,
                elastic_resize_monitor_interval_s=ray_config.elastic_resize_monitor_interval_s,  # type: ignore[call-arg]
            ),
            run_config=RunConfig(
                name=f"{time.time_ns()}",
                storage_path=self._own or f"{folder.path}/.ray",
                storage_filesystem=None if self._own or folder.is_local else folder.filesystem,
                failure_config=FailureConfig(max_failures=ray_config.max_failures),
                worker_runtime_env={"env_vars": self._network} if self._network else None,  # type: ignore[call-arg]
                callbacks=callbacks,  # type: ignore[arg-type]  # Ray annotates its old Callback
            ),
        )
