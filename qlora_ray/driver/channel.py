"""The mailbox between driver and workers: progress one way, a request to stop the other."""

import ray

from qlora_ray.model.facts import ModelFacts
from qlora_ray.worker.messages import DEATH, FREEZE, Failed, Fatal, Holding, Message, Ready, Refused, Run

MAX_REPETITIONS = 3  # of one failure at one step


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Channel:
    """Holds messages until the driver takes them, and remembers failures across worker groups."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._run: Run | None = None
        self._measured: ModelFacts | Refused | None = None
        self._is_called_off = False
        self._stop = False
        self._hold: str | None = None
        self._is_holding = False
        self._fatal: str | None = None
        self._furthest_step = 0
        self._failures: list[tuple[int, str]] = []  # furthest step at that time, cause

    def tell(self, message: Message) -> tuple[bool, str | None]:
        """Keep a message for the driver; answers whether the run shall stop, and why the workers shall hold, if so."""
        self._messages.append(message)
        self._furthest_step = max(self._furthest_step, getattr(message, "step", 0))
        match message:
            case Failed(cause):
                self._failures.append((self._furthest_step, cause))
            case Fatal(reason) | Refused(reason):
                self._fatal = reason
            case Ready():
                self._hold, self._is_holding = None, False
            case Holding():
                self._is_holding = True
        return self._stop, self._hold

    def take(self, run: Run) -> list[Message]:
        """All messages since the last call, oldest first. `run` is for workers that start: told each time, since this
        process may have taken the place of one that died.
        """
        self._run = run
        taken, self._messages = self._messages, []
        return taken

    def call_off(self) -> None:
        """There will be nothing to do."""
        self._is_called_off = True

    def wanted(self, measured: ModelFacts | Refused | None = None) -> tuple[Run | None, bool]:
        """What workers are to do, None while that is not known yet, and whether there will be nothing to do.

        `measured` is for the driver, which plans by it: told each time, as `take` is told the run.
        """
        self._measured = measured or self._measured
        return self._run, self._is_called_off

    def measured(self) -> ModelFacts | Refused | None:
        """What a worker found that the base and its adapter hold, once it has."""
        return self._measured

    def stop(self) -> None:
        """Ask the run to stop after its current step, leaving a checkpoint."""
        self._stop = True

    def hold(self, why: str) -> None:
        """Ask the workers to save after their current step, and to wait for their end."""
        self._hold = why

    def is_holding(self) -> bool:
        """Whether they have saved and wait."""
        return self._is_holding

    def reason_to_give_up(self) -> str | None:
        """Why a worker group that is about to start should not: what failed would fail again."""
        last = self._failures[-MAX_REPETITIONS:]
        if self._fatal is None and len(last) == MAX_REPETITIONS and len(set(last)) == 1 and not is_death(last[0][1]):
            step, cause = last[0]
            self._fatal = f"the same failure {MAX_REPETITIONS} times after step {step:,}, without progress: {cause}"
        return self._fatal


def is_death(cause: str) -> bool:
    """Whether a process was ended from outside, as far as one can tell: that says nothing about the next time."""
    return cause.endswith((DEATH, FREEZE))
