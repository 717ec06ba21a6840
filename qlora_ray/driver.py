"""Runs the TorchTrainer, listens to its workers, and closes the run directory whatever happens."""

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

from qlora_ray.config import Config
from qlora_ray.data.prepare import Prepared
from qlora_ray.plan import Plan
from qlora_ray.storage import Folder

STOP_TIMEOUT_SECONDS = 300
POLL_SECONDS = 0.2


class Driver:
    """One run, from ready data to a closed run directory."""

    def __init__(self, config: Config, plan: Plan, run: Folder, data: Prepared, debug: bool, began: float):
        self._config, self._plan, self._run, self._data, self._debug = config, plan, run, data, debug
        self._began = began
        self._seconds: dict[str, float] = {"prepare": time.perf_counter() - began}
        self._done: dict[str, Any] = {}
        self._refusal: str | None = None
        self._starts: list[dict[str, Any]] = []
        self._last_step = 0

    def fit(self) -> dict[str, Any]:
        """Train to the end, to Ctrl-C or to failure; write summary.json and report.html; return the summary."""
        import ray

        from qlora_ray import report, screen
        from qlora_ray.worker.channel import Channel

        channel = Channel.remote()
        fit = _Fit(self._make_trainer(channel))
        with screen.Progress(self._plan) as progress:
            try:
                while fit.is_running():
                    self._listen(ray.get(channel.take.remote(), timeout=60), progress)
                    time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                progress.say("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")
                self._stop(channel, fit, progress)
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                self._listen(ray.get(channel.take.remote(), timeout=10), progress)
        summary = self._summary(fit)
        if self._done.get("samples"):
            (self._run / "samples.json").write_bytes(json.dumps(self._done["samples"], ensure_ascii=False).encode())
        (self._run / "summary.json").write_bytes(json.dumps(summary, indent=1, ensure_ascii=False).encode())
        if self._run.is_local and (self._run / "metrics.jsonl").exists():
            report.write_report(Path(self._run.path))
        return summary

    def _make_trainer(self, channel):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from qlora_ray.worker import train_worker

        plan = self._plan
        job = {
            "config": self._config,
            "plan": plan,
            "run_folder": self._run,
            "rows": self._data.entry,
            "fingerprint": self._data.stats.fingerprint,
            "channel": channel,
            "debug": self._debug,
        }
        # Ray's own bookkeeping gets a fresh name each time: what it leaves behind can never block a run of ours.
        return TorchTrainer(
            train_worker,
            train_loop_config=job,
            scaling_config=ScalingConfig(
                num_workers=plan.num_workers, use_gpu=plan.use_gpu, resources_per_worker=plan.resources_per_worker
            ),
            run_config=RunConfig(
                name=f"{time.time_ns()}",
                storage_path=f"{self._run.path}/.ray",
                storage_filesystem=None if self._run.is_local else self._run.filesystem,
                failure_config=FailureConfig(max_failures=self._config.ray.max_failures),
            ),
        )

    def _listen(self, messages: list[dict[str, Any]], progress) -> None:
        for message in messages:
            kind = message.pop("kind")
            if kind == "ready":
                self._starts.append({"step": message["step"], "last_step": self._last_step})
                self._seconds.setdefault("load", message["seconds"])
                self._seconds.setdefault("to_first_step", time.perf_counter() - self._began)
            elif kind == "logged":
                self._last_step = message["step"]
                progress.show(message)
            elif kind == "evaluated":
                progress.say_evaluation(message)
            elif kind == "refused":
                self._refusal = message["message"]
            elif kind == "done":
                self._done = message

    def _stop(self, channel, fit: "_Fit", progress) -> None:
        import ray

        ray.get(channel.stop.remote(), timeout=60)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        with contextlib.suppress(KeyboardInterrupt):
            while fit.is_running() and time.monotonic() < deadline:
                self._listen(ray.get(channel.take.remote(), timeout=60), progress)
                time.sleep(POLL_SECONDS)

    def _summary(self, fit: "_Fit") -> dict[str, Any]:
        done = {name: value for name, value in self._done.items() if name not in ("samples",)}
        status = "refused" if self._refusal else done.pop("status", "interrupted" if fit.is_running() else "failed")
        self._seconds["total"] = time.perf_counter() - self._began
        failures = [
            {"step": start["last_step"], "resumed_from": start["step"], "cause": "worker failure"}
            for start in self._starts[1:]
        ]
        return {
            "status": status,
            "reason": self._refusal or (str(fit.error) if fit.error else None),
            "steps": done.pop("step", self._last_step),
            "planned_steps": self._plan.num_steps,
            **done,
            "seconds": {name: round(value, 2) for name, value in self._seconds.items()},
            "failures": failures,
            "adapter": f"{self._run.path}/adapter" if done else None,
        }


class _Fit:
    """TorchTrainer.fit in a thread, so that the main thread can listen and be interrupted."""

    def __init__(self, trainer):
        self.error: BaseException | None = None
        self._trainer = trainer
        self._thread = threading.Thread(target=self._run, daemon=True, name="fit")
        self._thread.start()

    def _run(self) -> None:
        from ray.train import ControllerError, TrainingFailedError

        try:
            self._trainer.fit()
        except (TrainingFailedError, ControllerError) as error:
            self.error = error

    def is_running(self) -> bool:
        return self._thread.is_alive()
