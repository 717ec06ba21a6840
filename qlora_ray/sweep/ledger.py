"""trials.jsonl: all that a sweep knows, one line an event, appended whole. Nothing else is read on resumption.

{"event": "sweep", "definition": {...}}                                     once, first
{"event": "session"}                                                        a driver started
{"event": "trial", "trial", "parameters"}                                   it was suggested
{"event": "report", "trial", "step", "<metric>", ...}                       it was judged
{"event": "exploit", "trial", "donor", "step", "sha256", "parameters"}      it goes on from another's checkpoint
{"event": "end", "trial", "status": done | stopped | failed, "reason"}      it never runs again
{"event": "close", "status", "reason"}                                      a driver ended in order
Every line has "time", in seconds since 1970.
"""

import errno
import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_ray.errors import ConfigError
from qlora_ray.rundir import names
from qlora_ray.storage import sync_folder

FILE = names.TRIAL_EVENTS


@dataclass
class TrialRecord:
    """What has happened to a trial."""

    name: str
    parameters: dict[str, Any]  # now
    first_parameters: dict[str, Any]
    reports: list[dict[str, Any]] = field(default_factory=list)  # each with the parameters of that time
    exploits: list[dict[str, Any]] = field(default_factory=list)
    status: str = "waiting"  # running, done, stopped, failed
    reason: str | None = None
    reported: int = 0  # step of the last report of the weights that it goes on with

    @property
    def has_ended(self) -> bool:
        """Whether it never runs again."""
        return self.status in ("done", "stopped", "failed")


class Ledger:
    """Appends events, and keeps what they add up to. One process writes; a lock keeps others out."""

    def __init__(self, run: Path):
        """Open or begin the ledger of a run directory. Raises ConfigError for one that is in use or damaged."""
        self.path = run / FILE
        run.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ConfigError(f"{self.path}: another process runs this sweep. Wait for it, or end it.") from None
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the writer was killed in the middle of a line
            os.ftruncate(self._file, whole)
        self.definition: dict[str, Any] | None = None
        self.trials: dict[str, TrialRecord] = {}
        self.seconds = self._seconds_before = self._session_began = 0.0  # of all sessions, each up to its last event
        for event in read_events(self.path):
            self._take(event)
        self.former_seconds = self.seconds
        sync_folder(str(run))

    def append(self, event: str, **values: Any) -> None:
        """Write one event; on return it is on disk."""
        entry = {"event": event, **values, "time": round(time.time(), 3)}
        line = (json.dumps(entry) + "\n").encode()
        if os.write(self._file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(self._file)
        self._take(entry)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)

    def live(self) -> list[TrialRecord]:
        """Trials that were suggested and have not ended, oldest first."""
        return [trial for trial in self.trials.values() if not trial.has_ended]

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "sweep":
            self.definition = event["definition"]
        elif kind == "session":
            self._session_began, self._seconds_before = event["time"], self.seconds
        elif kind == "trial":
            self.trials[event["trial"]] = TrialRecord(event["trial"], event["parameters"], event["parameters"])
        elif kind == "report":
            trial = self.trials[event["trial"]]
            trial.reports.append({**event, "parameters": trial.parameters})
            trial.reported = event["step"]
        elif kind == "exploit":
            trial = self.trials[event["trial"]]
            trial.exploits.append(event)
            trial.parameters, trial.reported = event["parameters"], event["step"]
        elif kind == "end":
            trial = self.trials[event["trial"]]
            trial.status, trial.reason = event["status"], event.get("reason")
        if self._session_began:
            self.seconds = self._seconds_before + event["time"] - self._session_began


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ledger; a torn last line does not count. Raises ConfigError for any other damage."""
    events = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            event = json.loads(line)
            event["event"], event["time"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: line {number} is not an event of a sweep ({error}). Start a new run.") from None
        events.append(event)
    return events
