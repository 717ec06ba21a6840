"""Tells the driver why a worker group failed. Runs in Ray Train's controller."""

import re
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from qlora_ray.worker.channel import DEATH, FREEZE

COLLATERAL = re.compile(r"connection (closed|reset)|connection refused|timed out|NCCL|gloo|aborted", re.IGNORECASE)


class ReportFailures(UserCallback):
    """Sends each failure of a worker group to the channel, with its likely cause."""

    def __init__(self, channel: Any, log_folder: str | None):
        self._channel, self._log_folder = channel, log_folder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if not any(map(_was_preempted, worker_exceptions.values())):  # announced: see worker/notice.py
            self._channel.tell.remote({"kind": "failed", "cause": self._cause(worker_exceptions)})

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
    from ray.exceptions import RayActorError

    inner = getattr(error, "health_check_failure", None) or error
    return isinstance(inner, RayActorError) and inner.preempted


def _describe(error: Exception) -> str:
    from ray.exceptions import RayActorError

    inner = getattr(error, "health_check_failure", None) or getattr(error, "_base_exc", error)
    if isinstance(inner, RayActorError):
        return DEATH
    if type(inner).__name__ == "WorkerHealthCheckTimeoutError":  # Ray Train does not export it
        return FREEZE
    text = str(inner).strip()
    return f"{type(inner).__name__}: {text.splitlines()[0] if text else ''}"
