"""What lies under a storage path: each run and sweep, how far it is, how long it still takes. Reads, never writes."""

import contextlib
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_ray.errors import ConfigError
from qlora_ray.rundir import names
from qlora_ray.rundir.metrics import read_lines
from qlora_ray.rundir.record import read_json, series
from qlora_ray.storage import open_folder

LEAST_SILENCE_SECONDS = 120.0  # without a line, after which a run that has not ended is called silent
SILENT_AFTER = 10  # times as long as between two of its last lines
RECENT_LINES = 20  # that tell the time left
START_SECONDS = 1800.0  # without a first line, after which a run that was begun is called silent too
READ_FILES = (
    names.CONFIG,
    names.METRICS,
    names.SUMMARY,
    names.PLAN,
    names.TRIAL_EVENTS,
    names.SAMPLES,
    names.SAMPLES_BY_STEP,
)
Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class RunState:
    """A run, or a trial of a sweep, as its files say."""

    name: str  # its path below the storage path
    state: str  # waiting, starting, running, silent, damaged; or how it ended: done, stopped, interrupted, failed
    changed: float = 0.0  # seconds since 1970
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    seconds_left: float | None = None  # of a run that goes on
    seconds_per_line: float = 0.0
    problem: str = ""  # why it is damaged or failed
    parameters: dict[str, Any] = field(default_factory=dict)  # of a trial

    @property
    def share_done(self) -> float:
        """Of its steps."""
        return min(1.0, self.step / self.num_steps) if self.num_steps else 0.0


@dataclass(frozen=True)
class SweepState:
    """A sweep and its trials."""

    name: str
    state: str
    changed: float
    trials: tuple[RunState, ...]


def look(root: Path) -> tuple[list[RunState], list[SweepState]]:
    """Runs and sweeps of a storage path, what changed last first."""
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    sweeps = [sweep_at(root, path.name) for path in folders if (path / names.TRIAL_EVENTS).is_file()]
    runs = [run_at(root, path.name) for path in folders if _is_run(path)]
    return sorted(runs, key=lambda one: -one.changed), sorted(sweeps, key=lambda one: -one.changed)


def stamp(folder: Path) -> Stamp:
    """What changes whenever a file of the folder that is shown does."""
    found = []
    for name in READ_FILES:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # not there yet, or no longer
            known = (folder / name).stat()
            found.append((name, known.st_mtime_ns, known.st_size))
    return tuple(found)


def run_at(root: Path, name: str) -> RunState:
    """The state of one run now."""
    read = _read_run(str(root), name, stamp(root / name))
    age = time.time() - read.changed
    allowed = {"running": max(LEAST_SILENCE_SECONDS, SILENT_AFTER * read.seconds_per_line), "starting": START_SECONDS}
    if read.state not in allowed:
        return read
    if age > allowed[read.state]:
        return replace(read, state="silent", seconds_left=None)
    left = read.seconds_left
    return replace(read, seconds_left=None if left is None else max(0.0, left - age))


def sweep_at(root: Path, name: str) -> SweepState:
    """The state of one sweep now, and of each of its trials."""
    folder = root / name
    events, problem = _events(folder)
    trials: dict[str, RunState] = {}
    for event in events:
        trial, kind = str(event.get("trial")), event.get("event")
        if kind == "trial":
            trials[trial] = replace(_trial(root, name, trial), parameters=event["parameters"])
        elif kind == "exploit" and trial in trials:
            trials[trial] = replace(trials[trial], parameters=event["parameters"])
        elif kind == "end" and trial in trials:
            ended = {"state": event["status"], "problem": event.get("reason") or "", "seconds_left": None}
            trials[trial] = replace(trials[trial], **ended)
    changed = max([event.get("time", 0.0) for event in events] + [one.changed for one in trials.values()], default=0.0)
    last = events[-1] if events else {}
    if problem:
        state = "damaged"
    elif last.get("event") == "close":
        state = last["status"]
    else:
        state = "running" if time.time() - changed < LEAST_SILENCE_SECONDS else "silent"
    return SweepState(name, state, changed, tuple(trials.values()))


def is_known(root: Path, name: str) -> bool:
    """Whether a name is that of a run, sweep or trial here, and no way out of the storage path."""
    parts = name.split("/")
    is_trial = len(parts) == 3 and parts[1] == names.TRIALS and (root / parts[0] / names.TRIAL_EVENTS).is_file()
    plain = all(part and not part.startswith(".") and "\\" not in part and "\0" not in part for part in parts)
    if not plain or not (len(parts) == 1 or is_trial):
        return False
    folder = root / name
    return _is_run(folder) or (len(parts) == 1 and (folder / names.TRIAL_EVENTS).is_file())


def _is_run(folder: Path) -> bool:
    is_sweep = (folder / names.TRIAL_EVENTS).is_file()
    return not is_sweep and any((folder / name).is_file() for name in (names.METRICS, names.CONFIG))


def _events(folder: Path) -> tuple[list[dict[str, Any]], str]:
    try:
        return read_lines(open_folder(str(folder.resolve())), names.TRIAL_EVENTS), ""
    except ConfigError as error:
        return [], str(error)


def _trial(root: Path, sweep: str, trial: str) -> RunState:
    name = f"{sweep}/{names.TRIALS}/{trial}"
    return run_at(root, name) if (root / name).is_dir() else RunState(name, "waiting")


@lru_cache(maxsize=1024)
def _read_run(root: str, name: str, of: Stamp) -> RunState:
    """A run as it was when its files had this stamp."""
    times = {file: nanoseconds / 1e9 for file, nanoseconds, _ in of}
    changed = max(times.values(), default=0.0)
    run = open_folder(str(Path(root, name).resolve()))
    try:
        lines, summary, plan = read_lines(run), read_json(run / names.SUMMARY), read_json(run / names.PLAN)
    except ConfigError as error:
        return RunState(name, "damaged", changed, problem=str(error))
    (steps, losses), (_, eval_losses) = series(lines, "loss"), series(lines, "eval_loss")
    num_steps = plan.get("num_steps")
    # A run that was resumed goes on beside the summary of its first end.
    has_ended = summary.get("status") and times[names.SUMMARY] >= times.get(names.METRICS, 0.0)
    seconds_per_step, seconds_per_line = _pace(lines)
    left = seconds_per_step * max(0, num_steps - steps[-1]) if num_steps and steps and seconds_per_step else None
    return RunState(
        name, summary["status"] if has_ended else "running" if lines else "starting", changed,
        step=steps[-1] if steps else 0, num_steps=num_steps, loss=losses[-1] if losses else None,
        eval_loss=eval_losses[-1] if eval_losses else None, seconds_left=None if has_ended else left,
        seconds_per_line=seconds_per_line, problem=(summary.get("reason") or "") if has_ended else "",
    )  # fmt: skip


def _pace(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds a step and seconds a line, validations and checkpoints included; 0 where it is not known yet."""
    recent = [line for line in lines if "time" in line and "step" in line][-RECENT_LINES:]
    if len(recent) < 2:
        return 0.0, 0.0
    seconds = recent[-1]["time"] - recent[0]["time"]
    steps = recent[-1]["step"] - recent[0]["step"]
    return (seconds / steps if steps > 0 else 0.0), seconds / (len(recent) - 1)
