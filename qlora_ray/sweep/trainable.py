"""What Ray Tune holds of a trial: an actor that starts the trial's process, tells its reports, and ends it."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from ray import tune

from qlora_ray.config import Config, as_written
from qlora_ray.errors import BrokenCheckpoint
from qlora_ray.rundir import checkpoints, names
from qlora_ray.storage import DISK_IS_FULL
from qlora_ray.sweep import exploit, space
from qlora_ray.sweep.process import STOP_FLAG, TrialProcess

POLL_SECONDS = 0.2
POINTER = "pointer.json"


class TrialActor(tune.Trainable):
    """One step is one report of the metric. Ray Tune's checkpoints only name a trial and a step of ours."""

    def setup(self, config: dict[str, Any], job: dict[str, Any] | None = None) -> None:
        """Ray Tune calls this first: `config` names the trial, `job` is what all trials of the sweep share."""
        assert job is not None  # Ray Tune gives what with_parameters was given
        self._job, self._run = job, Path(job["run"])
        self._name = config["trial"]
        told = {key: value for key, value in config.items() if key != "trial"}  # by pbt and optuna
        self._parameters = told or job["parameters"][self._name]
        base = Config.model_validate(job["config"])
        values = as_written(space.config_of(base, self._parameters))
        del values["sweep"]
        values["ray"] |= {
            "address": job["address"], "storage_path": str(self._run / names.TRIALS), "run_name": self._name,
            "allow_unauthenticated": True,  # the cluster that runs this actor: the sweep has asked it
        }  # fmt: skip
        self._process = TrialProcess(self._run / names.TRIALS, self._name, values, job["cwd"], job["submitted"])
        self._reported = job["reported"].get(self._name, 0)
        self._last: dict[str, Any] = {}
        self._no_space: str | None = None  # why it waits for the end of the sweep

    def step(self) -> dict[str, Any]:
        """Wait for the next report of the process, or for its end."""
        try:
            if self._no_space:
                return self._waits_for_space(self._no_space)
            if not self._process.is_started():
                self._begin()
            while True:
                if (self._run / STOP_FLAG).exists():
                    self._process.stop()
                    time.sleep(POLL_SECONDS)
                    return {"status": "interrupted"}
                code = self._process.exit_code()
                report = self._next_report(code is not None)
                if report and not math.isfinite(report[self._job["metric"]]):
                    return self._ends("failed", f"{self._job['metric']} is not finite at step {report['step']}")
                if code is not None and (report is None or report["is_last"]):
                    return self._after_the_end(code, report)
                if report:
                    return report
                time.sleep(POLL_SECONDS)
        except BrokenCheckpoint as error:
            return self._ends("failed", str(error))
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            return self._waits_for_space(str(error))

    def _begin(self) -> None:
        with self._process.alone():
            if exploit.read(self._process.run):
                exploit.finish(self._process.run)
        if self._process.summary().get("status") != "done":  # else its sweep died before it knew
            self._process.start()

    def _next_report(self, has_ended: bool) -> dict[str, Any] | None:
        """The next line with the metric; of a process that goes on not that of its last step, which its end tells."""
        metric = self._job["metric"]
        found = [line for line in self._process.lines() if line["step"] > self._reported and metric in line]
        if not found or (not has_ended and found[0]["step"] == self._process.num_steps()):
            return None
        step = found[0]["step"]
        interval = self._job["perturbation_interval"]
        if interval and step % interval == 0 and not has_ended:
            if not (self._process.run / "checkpoints" / f"step_{step:08d}" / checkpoints.MANIFEST).exists():
                return None
            exploit.pin(self._run / "pins", self._process.run, step)
        self._reported = step
        self._last = {"step": step, metric: found[0][metric]}
        return {**self._last, **self._exploited(), "is_last": len(found) == 1}

    def _after_the_end(self, code: int, report: dict[str, Any] | None) -> dict[str, Any]:
        if code != 0:
            why = self._process.why_it_failed(code)
            if any(os.strerror(number) in why for number in DISK_IS_FULL):
                return self._waits_for_space(why)
            return self._ends("failed", why)
        summary, metric = self._process.summary(), self._job["metric"]
        known = {metric: summary[metric]} if metric in summary else {}
        if not report and not known and not self._last and not self._reported:
            return self._ends("failed", f"it ended without a report of {metric}")
        return {**self._last, **known, "step": summary["steps"], "is_last": True, **self._ends("done", None),
                "is_new": bool(report or metric == "exact_match_adapter")}  # fmt: skip

    def _waits_for_space(self, why: str) -> dict[str, Any]:
        """No fault of the trial: the sweep ends, and with --resume it goes on."""
        time.sleep(POLL_SECONDS)
        self._no_space = why
        return {"status": "interrupted", "no_space": why}

    def _ends(self, status: str, reason: str | None) -> dict[str, Any]:
        self._process.stop()
        return {"status": status, "reason": reason, "done": True, **self._exploited()}

    def _exploited(self) -> dict[str, Any]:
        record = exploit.read(self._process.run)
        return {"exploit": record} if record else {}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Name the step last reported."""
        Path(checkpoint_dir, POINTER).write_text(json.dumps({"trial": self._name, "step": self._reported}))

    def load_checkpoint(self, checkpoint_dir: Any) -> None:
        """Take over what another trial's checkpoint names; of one's own the newest counts anyway."""
        pointer = json.loads(Path(checkpoint_dir, POINTER).read_text())
        if pointer["trial"] != self._name:
            pins, run = self._run / "pins", self._process.run
            with self._process.alone():
                exploit.take_over(pins, run, pointer["trial"], pointer["step"], self._parameters)
        self._reported = pointer["step"]

    def cleanup(self) -> None:
        """Ray Tune ends the trial, or moves it: leave a checkpoint."""
        self._process.stop()
