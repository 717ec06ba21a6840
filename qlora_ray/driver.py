"""Runs the TorchTrainer, listens to its workers, and closes the run directory whatever happens."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_ray.config import Config
from qlora_ray.data.prepare import Prepared
from qlora_ray.plan import Plan
from qlora_ray.storage import FREE_SPACE, Folder, unless_full
from qlora_ray.trackers import Trackers

STOP_TIMEOUT_SECONDS = 300
POLL_SECONDS = 0.2


class Driver:
    """One run, from ready data to a closed run directory."""

    def __init__(
        self, config: Config, plan: Plan, run: Folder, data: Prepared, debug: bool, began: float,
        network: dict[str, str],
    ):  # fmt: skip
        """`network` is what tells the workers which interface to use, as environment variables."""
        self._network = network
        self._config, self._plan, self._run, self._data, self._debug = config, plan, run, data, debug
        self._began = began
        self._seconds: dict[str, float] = {"prepare": time.perf_counter() - began}
        self._done: dict[str, Any] = {}
        self._refusal: str | None = None
        self._failures: list[dict[str, Any]] = []  # survived, or the last one
        self._interruptions: list[dict[str, Any]] = []  # announced: another number of workers, a node taken away
        self._fatal: str | None = None
        self._last_step = 0
        self._samples = ""  # lines of samples_by_step.jsonl that are still to be written
        self._trackers = Trackers(
            config.logging.trackers,
            run.path if run.is_local else f"{run.name}-trackers",
            config.model_dump(mode="json"),
        )

    def fit(self) -> dict[str, Any]:
        """Train to the end, to Ctrl-C or to failure; write summary.json and report.html; return the summary."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from qlora_ray.worker.channel import Channel

        with self._quiet():
            # On the driver's own node: what is known of a run must not go with a worker's.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            return self._fit(Channel.options(scheduling_strategy=here).remote())  # type: ignore[attr-defined]  # what ray.remote makes of the class

    def _fit(self, channel: Any) -> dict[str, Any]:
        import ray

        from qlora_ray import cluster, screen

        fit = _Fit(lambda: self._make_trainer(channel), channel, self._config)
        with screen.Progress(self._plan) as progress:
            try:
                while fit.is_running() and not (dead := cluster.dead_processes()):
                    self._listen(ray.get(channel.take.remote(), timeout=60), progress)
                    time.sleep(POLL_SECONDS)
                if fit.is_running():
                    self._fatal = f"Ray on this machine has lost its {' and '.join(dead)}."
            except KeyboardInterrupt:
                progress.say("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")
                self._stop(channel, fit, progress)
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                self._listen(ray.get(channel.take.remote(), timeout=10), progress)
            self._trackers.close()
            self._say_what_failed(progress)
        summary = self._summary(fit)
        problem = unless_full(lambda: self._close(summary), "what closes the run", self._run)
        if problem and summary["status"] != "failed":
            summary |= {"status": "failed", "reason": f"{problem}. {FREE_SPACE}"}
        return summary

    def _close(self, summary: dict[str, Any]) -> None:
        from qlora_ray import report

        self._write_samples()
        if self._done.get("samples"):
            (self._run / "samples.json").write_bytes(json.dumps(self._done["samples"], ensure_ascii=False).encode())
        self._finish_cards(summary)
        (self._run / "summary.json").write_bytes(json.dumps(summary, indent=1, ensure_ascii=False).encode())
        if self._run.is_local and (self._run / "metrics.jsonl").exists():
            report.write_report(Path(self._run.path))

    def _quiet(self) -> contextlib.AbstractContextManager:
        from qlora_ray import screen

        if self._debug:
            return contextlib.nullcontext()
        local = self._run.is_local
        return screen.chatter_goes_to(f"{(self._run / 'logs').make().path}/driver.log" if local else os.devnull)

    def _make_trainer(self, channel):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from qlora_ray.elastic import SaveBeforeResize
        from qlora_ray.failures import ReportFailures
        from qlora_ray.worker import train_worker

        plan = self._plan
        logs = f"{self._run.path}/logs" if self._run.is_local else None
        job = {
            "config": self._config,
            "plan": plan,
            "run_folder": self._run,
            "rows": self._data.entry,
            "fingerprint": self._data.stats.fingerprint,
            "channel": channel,
            "debug": self._debug,
        }
        # Each starts a process beside the workers: one for data that Ray Train delivers, which is none, and one that
        # asks a dashboard, which not every cluster runs (see cluster.release_workers).
        needless = {"DatasetsCallback", "PlacementGroupCleanerCallback"}

        class Trainer(TorchTrainer):
            def _create_default_callbacks(self):
                made = super()._create_default_callbacks()  # type: ignore[misc]  # Ray annotates its old trainer
                return [one for one in made if type(one).__name__ not in needless]

        # Ray's own bookkeeping gets a fresh name each time: what it leaves behind can never block a run of ours.
        return Trainer(
            train_worker,
            train_loop_config=job,
            scaling_config=ScalingConfig(
                num_workers=self._config.ray.num_workers,  # type: ignore[arg-type]  # Ray annotates its old ScalingConfig
                use_gpu=plan.use_gpu,
                resources_per_worker=plan.resources_per_worker,
                elastic_resize_monitor_interval_s=self._config.ray.elastic_resize_monitor_interval_s,  # type: ignore[call-arg]
            ),
            run_config=RunConfig(
                name=f"{time.time_ns()}",
                storage_path=f"{self._run.path}/.ray",
                storage_filesystem=None if self._run.is_local else self._run.filesystem,
                failure_config=FailureConfig(max_failures=self._config.ray.max_failures),
                worker_runtime_env={"env_vars": self._network} if self._network else None,  # type: ignore[call-arg]
                callbacks=[ReportFailures(channel, logs), SaveBeforeResize(channel)],  # type: ignore[list-item]  # Ray annotates its old Callback
            ),
        )

    def _listen(self, messages: list[dict[str, Any]], progress) -> None:
        for message in messages:
            kind = message.pop("kind")
            if kind == "ready":
                self._recovered(message["step"])
                for reason in message["broken"]:
                    progress.note(f"{reason} Going on from step {message['step']:,}.")
                self._seconds.setdefault("load", message["seconds"])
                self._seconds.setdefault("to_first_step", time.perf_counter() - self._began)
            elif kind == "step":
                self._last_step = message["step"]
            elif kind == "failed":
                self._note(self._failures, message["cause"])
                cause, step = message["cause"], self._last_step
                progress.note(f"{cause} after step {step:,}: going back to the last checkpoint")
            elif kind == "interruption":
                self._note(self._interruptions, message["cause"])
                progress.note(f"{message['cause']}: saving after step {self._last_step:,}")
            elif kind == "warning":
                progress.note(f"{message['message']}")
            elif kind == "fatal":
                self._fatal = self._fatal or message["message"]
            elif kind == "logged":
                self._last_step = message["step"]
                progress.show(message)
                self._track(message, progress)
            elif kind == "evaluated":
                self._keep_samples(message["step"], message.pop("samples"), progress)
                progress.say_evaluation(message)
                self._track(message, progress)
            elif kind == "refused":
                self._refusal = message["message"]
            elif kind == "done":
                self._done = message

    def _note(self, events: list[dict[str, Any]], cause: str) -> None:
        events.append({"step": self._last_step, "cause": cause, "at": time.perf_counter()})

    def _recovered(self, step: int) -> None:
        for event in (*self._failures[-1:], *self._interruptions[-1:]):
            if "resumed_from" not in event:
                event |= {
                    "resumed_from": step,
                    "steps_redone": max(0, self._last_step - step),
                    "seconds_to_recover": round(time.perf_counter() - event["at"], 2),
                }

    def _track(self, entry: dict[str, Any], progress) -> None:
        self._trackers.log(entry)
        self._say_what_failed(progress)

    def _say_what_failed(self, progress) -> None:
        for failure in self._trackers.take_failures():
            progress.say(failure)

    def _keep_samples(self, step: int, samples: list[dict[str, Any]], progress) -> None:
        """Add answers from the middle of training to samples_by_step.jsonl; of a step done again, the last count."""
        self._samples += "".join(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
        if problem := unless_full(self._write_samples, "samples_by_step.jsonl", self._run):
            progress.note(f"{problem}. Its lines wait for space.")

    def _write_samples(self) -> None:
        if self._samples:
            path = self._run / "samples_by_step.jsonl"
            path.write_bytes((path.read_bytes() if path.exists() else b"") + self._samples.encode())
            self._samples = ""

    def _stop(self, channel, fit: "_Fit", progress) -> None:
        import ray

        ray.get(channel.stop.remote(), timeout=60)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        with contextlib.suppress(KeyboardInterrupt):
            while fit.is_running() and time.monotonic() < deadline:
                self._listen(ray.get(channel.take.remote(), timeout=60), progress)
                time.sleep(POLL_SECONDS)

    def _finish_cards(self, summary: dict[str, Any]) -> None:
        """Add what is known only at the end, the exact match, to record and card of the final adapter."""
        from qlora_ray.model import card
        from qlora_ray.model.record import FILE

        known = {name: summary[name] for name in ("exact_match_base", "exact_match_adapter") if name in summary}
        if known:
            folder = self._run / "adapter"
            record = json.loads((folder / FILE).read_bytes())
            record["metrics"] |= known
            (folder / FILE).write_bytes(json.dumps(record, indent=1).encode())
            (folder / "README.md").write_bytes(card.render(record).encode())

    def _summary(self, fit: "_Fit") -> dict[str, Any]:
        done = {name: value for name, value in self._done.items() if name not in ("samples",)}
        ended = "interrupted" if fit.is_running() and not self._fatal else "failed"
        status = "refused" if self._refusal else done.pop("status", ended)
        self._seconds["total"] = time.perf_counter() - self._began
        survived = {
            name: [{key: value for key, value in event.items() if key != "at"} for event in events]
            for name, events in (("failures", self._failures), ("interruptions", self._interruptions))
        }
        return {
            "status": status,
            "reason": self._refusal or self._fatal or (str(fit.error) if fit.error else None),
            "steps": done.pop("step", self._last_step),
            "planned_steps": self._plan.num_steps,
            **done,
            "seconds": {name: round(value, 2) for name, value in self._seconds.items()},
            **survived,
            "adapter": f"{self._run.path}/adapter" if done else None,
        }


class _Fit:
    """TorchTrainer.fit in a thread, so that the main thread can listen and be interrupted.

    Ray Train restarts worker groups. When its controller itself dies, a new trainer takes over from our checkpoints.
    """

    def __init__(self, make_trainer: Callable[[], Any], channel: Any, config: Config):
        self.error: BaseException | None = None
        self._make_trainer, self._channel, self._config = make_trainer, channel, config
        self._tries_left = 1 + config.ray.max_failures
        self._thread = threading.Thread(target=self._run, daemon=True, name="fit")
        self._thread.start()

    def _run(self) -> None:
        from ray.exceptions import RayActorError
        from ray.train import ControllerError, TrainingFailedError

        from qlora_ray import cluster
        from qlora_ray.worker.channel import DEATH

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
                self._channel.tell.remote({"kind": "failed", "cause": f"Ray Train's controller {DEATH}"})
                cluster.release_workers()

    def is_running(self) -> bool:
        return self._thread.is_alive()
