"""One trial as a process of its own: python -m qlora_ray.train, started, followed through its files, and ended.

<run>/trials/
    t0003.yaml      its config
    t0003.log       what it said
    t0003/          its run directory
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from qlora_ray.environment import JOB_CONFIG
from qlora_ray.errors import ConfigError
from qlora_ray.rundir import checkpoints, names
from qlora_ray.rundir.metrics import read_lines
from qlora_ray.rundir.record import read_json
from qlora_ray.storage import open_folder
from qlora_ray.sweep import child

STOP_SECONDS = 120  # to finish a step and save
STOP_FLAG = "stop"  # a file in the sweep's run directory: all trials leave a checkpoint and end
MAX_DEATHS = 3  # in a row, without a new checkpoint


class TrialProcess:
    """Starts the process, again where it was killed, and reads what it writes."""

    def __init__(self, trials: Path, name: str, config: dict[str, Any], cwd: str | None, submitted: str | None = None):
        """`submitted` is what `ray job submit` gave the sweep: its trials then run the same uploaded code."""
        self.run = trials / name
        self._lock = str(trials / f".{name}.lock")
        self._trials, self._name, self._config = trials, name, config
        self._environment = {**os.environ, **({JOB_CONFIG: submitted} if submitted else {})}
        self._cwd = cwd if cwd and os.path.isdir(cwd) else None
        self._process: subprocess.Popen | None = None
        self._deaths, self._step_of_death = 0, -1
        self._seen: tuple[int, int] | None = None
        self._lines: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start, or go on from the newest checkpoint. Raises BrokenCheckpoint where none is whole."""
        with self.alone():
            resume = self.newest_step() is not None
            if not resume and self.run.exists():  # killed before its first checkpoint
                shutil.rmtree(self.run)
        config = self._trials / f"{self._name}.yaml"
        config.write_text(yaml.safe_dump(self._config, sort_keys=False), "utf-8")
        command = [sys.executable, "-m", "qlora_ray.sweep.child", str(os.getpid()), self._lock, "-c", str(config)]
        with open(self._trials / f"{self._name}.log", "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command + ["--resume"] * resume, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._cwd,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for the sweep, which then asks its trials to stop
            )  # fmt: skip

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """While no process of this trial runs, one that another actor started and that is being ended included."""
        return child.held(self._lock)

    def is_started(self) -> bool:
        """Whether this object has started the process."""
        return self._process is not None

    def newest_step(self) -> int | None:
        """Step of the newest whole checkpoint. Raises BrokenCheckpoint."""
        found = checkpoints.newest_whole(open_folder(str(self.run)))
        return None if found is None else int(found[0].name.removeprefix("step_"))

    def exit_code(self) -> int | None:
        """None while it runs, 0 if it was never needed. One that was killed is started again, unless that is no use."""
        if self._process is None:
            return 0
        code = self._process.poll()
        if code is None or code in (0, 1, 2):
            return code
        try:
            step = self.newest_step() or 0
        except ConfigError:
            return code
        self._deaths = self._deaths + 1 if step <= self._step_of_death else 1
        self._step_of_death = step
        if self._deaths > MAX_DEATHS:
            return code
        self.start()
        return None

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl, in order of step."""
        try:
            found = (self.run / names.METRICS).stat()
            if (found.st_ino, found.st_size) != self._seen:
                self._lines = read_lines(open_folder(str(self.run)))
                self._seen = found.st_ino, found.st_size
        except FileNotFoundError:
            return []
        return self._lines

    def summary(self) -> dict[str, Any]:
        """summary.json; {} where there is none."""
        return read_json(open_folder(str(self.run)) / names.SUMMARY)

    def num_steps(self) -> int | None:
        """Optimizer steps that the trial will take; None before its plan is made."""
        return read_json(open_folder(str(self.run)) / names.PLAN).get("num_steps")

    def why_it_failed(self, code: int) -> str:
        """One line."""
        if code < 0:
            return f"killed by signal {-code}, {self._deaths} times without a new checkpoint"
        if code == 130:
            return "interrupted from outside, again and again"
        reason = self.summary().get("reason") if code == 1 else None
        if reason:
            return str(reason).strip().splitlines()[0]
        log = (self._trials / f"{self._name}.log").read_text("utf-8", errors="replace").strip().splitlines()
        errors = [line for line in log if line.startswith("error: ")]
        return (errors or log or [f"exit code {code}"])[-1].removeprefix("error: ")

    def stop(self) -> None:
        """End the process: first so that it leaves a checkpoint, then at once."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def submitted_job() -> str | None:
    """The runtime environment that `ray job submit` gave this process, for processes that shall have the same."""
    given = os.environ.get(JOB_CONFIG)
    return json.dumps({"runtime_env": json.loads(given).get("runtime_env") or {}}) if given else None
