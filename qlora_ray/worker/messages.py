"""What driver and workers tell each other: the run that is to be done one way, what happens the other way."""

from dataclasses import dataclass
from typing import Any

from qlora_ray.config import Config
from qlora_ray.planning.plan import Plan
from qlora_ray.storage import Folder

DEATH, FREEZE = "died", "froze"  # how the cause of a process's end from outside ends


@dataclass(frozen=True)
class Run:
    """What every worker is given."""

    config: Config
    plan: Plan
    folder: Folder  # the run directory
    rows: Folder  # the tokenized rows, an entry of the cache
    fingerprint: str  # of the rows
    debug: bool


@dataclass(frozen=True)
class Ready:
    """The first step is next."""

    step: int  # done before
    began: float  # time.time() when this worker was called
    parts: dict[str, float]  # seconds of its start: laps.py
    broken: list[str]  # what is wrong with newer checkpoints


@dataclass(frozen=True)
class Referring:
    """Rounds of the reference's log-probabilities are done."""

    split: str
    done: int
    total: int


@dataclass(frozen=True)
class Stepped:
    """A step is done, and not logged."""

    step: int


@dataclass(frozen=True)
class Logged:
    """A line of metrics.jsonl: the figures of the steps since the one before."""

    entry: dict[str, Any]

    @property
    def step(self) -> int:
        """The last of the steps."""
        return self.entry["step"]


@dataclass(frozen=True)
class Evaluated:
    """A validation: its figures, and answers to some held-out prompts."""

    step: int
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Warned:
    """Something that a user should know, and that does not end the run."""

    text: str


@dataclass(frozen=True)
class Failed:
    """A worker group, or the controller, has ended; the run goes back to its last checkpoint."""

    cause: str


@dataclass(frozen=True)
class Interrupted:
    """This worker group will end, which was announced: a node taken away, another number of workers."""

    cause: str
    step: int = 0


@dataclass(frozen=True)
class Holding:
    """The workers have saved, and wait for the end of their group."""


@dataclass(frozen=True)
class Refused:
    """The user asked for something impossible, as workers found."""

    reason: str


@dataclass(frozen=True)
class Fatal:
    """The run ends: trying again would not help."""

    reason: str


@dataclass(frozen=True)
class Done:
    """The loop has ended in order."""

    status: str  # done or interrupted
    state: dict[str, Any]  # worker/state.py
    answers: dict[str, Any]  # worker/evaluate.py, compare_answers
    early: bool  # stopped by training.early_stopping_patience
    pairs: list[dict[str, Any]]  # the same, compare_pairs


Message = (
    Ready | Referring | Stepped | Logged | Evaluated | Warned | Failed | Interrupted | Holding | Refused | Fatal | Done
)  # fmt: skip
