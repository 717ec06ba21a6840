"""The driver's side of a sweep while it runs: a live table, budgets, and how it is asked to stop."""

import contextlib
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from qlora_ray.cluster import connect
from qlora_ray.cluster.scratch import scratch
from qlora_ray.config import as_written
from qlora_ray.console import console
from qlora_ray.rundir import names
from qlora_ray.rundir.metrics import read_lines
from qlora_ray.storage import FREE_SPACE, open_folder, unless_full
from qlora_ray.sweep import results, space
from qlora_ray.sweep.capacity import Planned
from qlora_ray.sweep.ledger import Ledger
from qlora_ray.sweep.process import STOP_FLAG, STOP_SECONDS, submitted_job
from qlora_ray.sweep.screen import show_value

REFRESH_SECONDS = 1.0
LEAST_FREE_BYTES = 16 * 2**20  # on the disk of the sweep: with less it ends while it still can
COLOURS = {"running": "cyan", "done": "green", "stopped": "yellow", "failed": "red"}


class Session:
    """Ray Tune in a thread, while the main thread watches, shows and can be interrupted."""

    def __init__(self, planned: Planned, run: Path, ledger: Ledger, began: float):
        """`began` is the time.monotonic() of the command."""
        self._config, self._run, self._ledger = planned.config, run, ledger
        self._sweep = space.sweep_of(planned.config)
        self._planned, self._reports, self._began = planned, planned.reports, began
        self._said: queue.Queue[tuple[str, str]] = queue.Queue()
        self._stop: tuple[str, str] | None = None  # status and reason
        self._stop_at = 0.0
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._rows: dict[str, _Tail] = {}

    def run(self) -> tuple[str, str | None]:
        """Run what is left to run; returns the sweep's status and reason."""
        from qlora_ray.sweep.tuning import WriteLedger

        self._clean()
        self._callback = WriteLedger(self._ledger, self._sweep.metric, lambda *said: self._said.put(said))
        asked = len(self._ledger.trials) if self._sweep.search != "optuna" else space.num_trials(self._config)
        if self._ledger.live() or len(self._ledger.trials) < asked:
            threading.Thread(target=self._fit, daemon=True, name="tune").start()
            self._watch()
            self._clean()
        if self._error is not None:
            raise self._error
        if self._stop:
            return self._stop
        if reason := self._too_many_failed():
            return "failed", reason
        if results.find_best(self._ledger, self._sweep) is None:
            return "failed", "no trial has reported"
        return "done", None

    def _fit(self) -> None:
        import ray

        from qlora_ray.sweep.tuning import make_tuner, run_config_of

        context = ray.get_runtime_context()
        address = next(one["NodeManagerAddress"] for one in ray.nodes() if one["NodeID"] == context.get_node_id())
        job = {
            "run": str(self._run),
            "config": as_written(self._config),
            "address": context.gcs_address,
            "cwd": str(Path.cwd()),
            "submitted": submitted_job(),
            "metric": self._sweep.metric,
            "perturbation_interval": self._reports.perturbation_interval,
            "parameters": {name: record.parameters for name, record in self._ledger.trials.items()},
            "reported": {name: record.reported for name, record in self._ledger.trials.items()},
        }
        try:
            # Ray Tune's own files, which nobody reads again: not where a full disk would end it.
            with scratch("qlora_ray_sweep_") as folder:
                run_config = run_config_of(Path(folder), self._callback, self._may_end)
                make_tuner(self._planned, self._ledger, job, run_config, f"node:{address}").fit()
        except BaseException as error:  # told by the main thread
            self._error = error
        finally:
            self._ended.set()

    def _watch(self) -> None:
        live: Any = Live(self._table(), console=console, refresh_per_second=2, transient=False, redirect_stdout=False,
                         redirect_stderr=False) if console.is_terminal else contextlib.nullcontext()  # fmt: skip
        with live:
            interruptions = 0
            while not self._ended.is_set():
                if dead := connect.dead_processes():
                    self._stop = "failed", f"Ray's {', '.join(dead)} died"
                    return
                try:
                    self._tell(live)
                    self._check_budgets()
                    # Not Thread.join: interrupted, it takes the thread for ended (Python 3.11, threading.py).
                    self._ended.wait(REFRESH_SECONDS)
                except KeyboardInterrupt:
                    interruptions += 1
                    if interruptions > 1:
                        return
                    console.print("Stopping: each trial leaves a checkpoint. Press Ctrl-C again to stop at once.")
                    self._ask_to_stop("interrupted", "asked to stop")
            self._tell(live)

    def _tell(self, live: Any) -> None:
        while not self._said.empty():
            name, what = self._said.get()
            if not console.is_terminal:
                console.print(f"{name}  {what}", markup=False)
        if console.is_terminal:
            live.update(self._table())

    def _check_budgets(self) -> None:
        if self._stop:
            return
        sweep, trials = self._sweep, self._ledger.trials.copy()
        seconds = self._ledger.former_seconds + time.monotonic() - self._began
        free = shutil.disk_usage(self._run).free
        if reason := self._callback.no_space:
            self._ask_to_stop("failed", f"{reason}. {FREE_SPACE}")
        elif free < LEAST_FREE_BYTES:
            self._ask_to_stop("failed", f"only {free / 2**20:.0f} MiB are free at {self._run}. {FREE_SPACE}")
        elif reason := self._too_many_failed():
            self._ask_to_stop("failed", reason)
        elif sweep.time_budget_seconds is not None and seconds > sweep.time_budget_seconds:
            self._ask_to_stop("done", f"sweep.time_budget_seconds={sweep.time_budget_seconds:g} is over")
        elif sweep.token_budget is not None and sum(self._tail(name).tokens for name in trials) >= sweep.token_budget:
            self._ask_to_stop("done", f"sweep.token_budget={sweep.token_budget} is used up")

    def _too_many_failed(self) -> str | None:
        failed = [record for record in self._ledger.trials.copy().values() if record.status == "failed"]
        most = self._sweep.max_failed_trials
        if len(failed) <= most:
            return None
        first = f"{failed[0].name}: {failed[0].reason}"
        return f"{len(failed)} trials failed, more than sweep.max_failed_trials={most}; {first}"

    def _ask_to_stop(self, status: str, reason: str) -> None:
        self._stop, self._stop_at = (status, reason), time.monotonic()
        self._callback.is_stopping = True
        if unless_full((self._run / STOP_FLAG).touch, STOP_FLAG, open_folder(str(self._run))):
            self._stop_at -= STOP_SECONDS + 30  # Ray Tune ends the trials, which leave a checkpoint then, too

    def _may_end(self) -> bool:
        if self._stop is None:
            return False
        all_said = self._callback.running <= self._callback.interrupted
        return all_said or time.monotonic() - self._stop_at > STOP_SECONDS + 30

    def _clean(self) -> None:
        (self._run / STOP_FLAG).unlink(missing_ok=True)

    def _tail(self, name: str) -> "_Tail":
        tail = self._rows.setdefault(name, _Tail(self._run / names.TRIALS / name))
        tail.read()
        return tail

    def _table(self) -> Table:
        keys = list(self._sweep.parameters)
        table = Table("trial", *(key.rsplit(".", 1)[-1] for key in keys), "step", "loss", "eval loss", "state")
        for name, record in self._ledger.trials.copy().items():
            tail = self._tail(name)
            parameters = [show_value(record.parameters[key]) for key in keys]
            state = record.status + (f", {len(record.exploits)} exploits" if record.exploits else "")
            table.add_row(name, *parameters, f"{tail.step:,}/{self._reports.num_steps:,}", show_value(tail.loss),
                          show_value(tail.eval_loss), f"[{COLOURS.get(record.status, 'dim')}]{state}[/]")  # fmt: skip
        return table


class _Tail:
    """What the metrics file of a trial says now."""

    def __init__(self, run: Path):
        self._run = open_folder(str(run))
        self._size: int | None = -1
        self.step, self.tokens = 0, 0
        self.loss: float | None = None
        self.eval_loss: float | None = None

    def read(self) -> None:
        """Look again, where the file has grown or shrunk."""
        size = (self._run / names.METRICS).size()
        if size == self._size:
            return
        self._size = size
        self.tokens = 0
        for entry in read_lines(self._run):
            self.step = entry["step"]
            self.tokens += entry.get("num_tokens", 0)
            self.loss = entry.get("loss", self.loss)
            self.eval_loss = entry.get("eval_loss", self.eval_loss)
