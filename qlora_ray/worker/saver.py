"""What a run writes beside its metrics: checkpoints, the best adapter and the last one. A full disk costs a checkpoint.

Checkpoints are gathered by all workers and written by rank 0 beside the next steps. No checkpoint is newer than a
best adapter that found no space: a run that goes on from it would not write that one again.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from qlora_ray.errors import Stop
from qlora_ray.storage import FREE_SPACE, unless_full
from qlora_ray.worker import checkpoint
from qlora_ray.worker.messages import Run, Warned
from qlora_ray.worker.state import AdapterState, State
from qlora_ray.worker.team import Team

MAX_FAILED_CHECKPOINTS = 3  # in a row, for want of space


class Saver:
    """One write at a time, in a thread of rank 0."""

    def __init__(self, run: Run, team: Team):
        self._run, self._team = run, team
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._best: Callable[[], None] | None = None  # writes the best adapter, where that is still to be done
        self._problem: str | None = None  # why the last checkpoint was not begun
        self._failures = 0

    def save_best(self, write: Callable[[], None]) -> None:
        """Write the best adapter now, or where the disk is full before the next checkpoint. For rank 0."""
        self._best = write
        if problem := self._write_best():
            self._team.tell(Warned(f"{problem}. It will be written before the next checkpoint."))

    def save(self, state: State, gather: Callable[[], AdapterState]) -> None:
        """Begin a checkpoint, once the one before is on disk. Every worker must call this; all of them `gather`."""
        self._wait(MAX_FAILED_CHECKPOINTS)
        whole = gather()
        if self._team.rank == 0:
            self._problem = self._write_best()
            if not self._problem:
                seed, fingerprint = self._run.config.training.seed, self._run.fingerprint
                progress = {"step": state.step, "state": vars(state), "fingerprint": fingerprint, "seed": seed}
                keep = self._run.config.checkpoint.keep
                self._writing = self._thread.submit(checkpoint.save, self._run.folder, whole, progress, keep)

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Every worker must call this. Raises Stop where it cannot be."""
        self._wait(max_failures=1)

    def save_last(self, write: Callable[[], None]) -> None:
        """Write the adapter, on rank 0. Every worker must call this. Raises Stop where the disk is full."""
        problem = unless_full(write, "the adapter", self._run.folder) if self._team.rank == 0 else None
        if problem := self._team.gather(problem)[0]:
            raise Stop(f"{problem}. {FREE_SPACE}")

    def _write_best(self) -> str | None:
        problem = unless_full(self._best, "the best adapter", self._run.folder) if self._best else None
        if not problem:
            self._best = None
        return problem

    def _wait(self, max_failures: int) -> None:
        writing, self._writing = self._writing, None
        written = unless_full(writing.result, "a checkpoint", self._run.folder) if writing else None
        problem = self._team.gather(self._problem or written)[0]
        self._failures = self._failures + 1 if problem else 0
        if problem and self._failures >= max_failures:
            raise Stop(f"{problem}, {self._failures}x in a row. {FREE_SPACE}")
        if problem:
            self._team.tell(Warned(f"{problem}. Training goes on; the next one is due as planned."))
