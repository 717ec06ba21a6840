"""TensorBoard, MLflow and Weights & Biases get each line of metrics.jsonl, from processes of their own.

The driver writes lines into a pipe and never waits, so a tracker that is slow, hangs or crashes costs the run nothing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_ray.config import flat
from qlora_ray.rundir import names

CLOSE_TIMEOUT_SECONDS = 30
PROJECT = "qlora_ray"


class Trackers:
    """The trackers of a run. `log` never waits and never raises; what failed is in `failures`, once each."""

    def __init__(self, trackers: Sequence[str], run_dir: str, config: dict[str, Any]):
        logs = Path(run_dir) / names.LOGS
        if trackers:
            logs.mkdir(parents=True, exist_ok=True)
        self.failures: list[str] = []
        self._logs = {name: logs / f"tracker_{name}.log" for name in trackers}
        self._processes = {name: self._start(name, run_dir) for name in trackers}
        self.log(flat(config))

    def log(self, entry: dict[str, Any]) -> None:
        """Send one line of metrics to each tracker that still lives."""
        line = json.dumps(entry).encode() + b"\n"
        for name, process in list(self._processes.items()):
            assert process.stdin is not None
            try:
                sent = os.write(process.stdin.fileno(), line)
            except BlockingIOError:
                self._give_up(name, "does not take the metrics in time")
            except BrokenPipeError:
                process.wait(timeout=CLOSE_TIMEOUT_SECONDS)
                self._give_up(name, self._last_words(name))
            else:
                if sent < len(line):
                    self._give_up(name, "does not take the metrics in time")

    def close(self) -> None:
        """Let the trackers finish; one that does not in 30 s is ended."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT_SECONDS
        for name, process in list(self._processes.items()):
            try:
                code = process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._give_up(name, f"did not finish in {CLOSE_TIMEOUT_SECONDS} s")
            else:
                if code:
                    self._give_up(name, self._last_words(name))

    def take_failures(self) -> list[str]:
        """What failed since the last call, to be said once."""
        taken, self.failures = self.failures, []
        return taken

    def _start(self, name: str, run_dir: str) -> subprocess.Popen:
        with self._logs[name].open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "qlora_ray.driver.trackers", name, str(Path(run_dir).resolve())],
                stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for the run; trackers end when it closes their pipe
            )  # fmt: skip
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _give_up(self, name: str, reason: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        self.failures.append(f"tracker {name}: {reason}. The run goes on without it (log: {self._logs[name]}).")

    def _last_words(self, name: str) -> str:
        lines = self._logs[name].read_text("utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "ended without a word"


def main(argv: list[str] | None = None) -> int:
    """One tracker's process: the config, then metrics, as JSON lines on stdin until it ends."""
    name, run_dir = sys.argv[1:] if argv is None else argv
    lines = map(json.loads, sys.stdin)
    {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}[name](Path(run_dir), next(lines), lines)
    return 0


def _tensorboard(run: Path, config: dict[str, Any], lines) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")
        for entry in lines:
            step = entry.pop("step")
            for name, value in entry.items():
                writer.add_scalar(name, value, step)
            writer.flush()


def _mlflow(run: Path, config: dict[str, Any], lines) -> None:
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{run.parent}/mlflow.db")  # one store for the runs beside each other
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    with mlflow.start_run(run_name=run.name):
        mlflow.log_params({name: str(value)[:500] for name, value in config.items()})
        for entry in lines:
            step = entry.pop("step")
            mlflow.log_metrics(entry, step=step)


def _wandb(run: Path, config: dict[str, Any], lines) -> None:
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    with wandb.init(project=project, name=run.name, dir=str(run), config=config) as tracked:
        tracked.define_metric("*", step_metric="step")
        for entry in lines:
            tracked.log(entry)


if __name__ == "__main__":
    sys.exit(main())
