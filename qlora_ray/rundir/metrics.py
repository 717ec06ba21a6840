"""metrics.jsonl: a line per logged step, validation or checkpoint, written by one process, gone on with on resume."""

import json
import time
from typing import Any

from qlora_ray.errors import ConfigError
from qlora_ray.rundir import names
from qlora_ray.storage import DISK_IS_FULL, Folder


def read_lines(run: Folder, name: str = names.METRICS) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file of a run directory, oldest first; none where there is no file.

    A line counts once its end is there: without it, it is being written now, or its writer died in the middle of it.
    Raises ConfigError for a whole line that is no JSON object.
    """
    file = run / name
    if not file.exists():
        return []
    lines = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n") or not line.strip():
            continue
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{file.path}, line {number}: not JSON ({error}).") from None
        if not isinstance(lines[-1], dict):
            raise ConfigError(f"{file.path}, line {number}: not a JSON object.")
    return lines


def as_bytes(lines: list[dict[str, Any]]) -> bytes:
    """What `read_lines` reads."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class MetricsFile:
    """Appends lines on a local disk; on object stores, which cannot append, rewrites the file at every flush."""

    def __init__(self, run: Folder, resume_step: int):
        """Steps after `resume_step`, that of the checkpoint, are done again: their lines go."""
        self._target = run / names.METRICS
        self._waiting = [line for line in read_lines(run) if line["step"] <= resume_step]
        self._rewrite()

    def write(self, **values: Any) -> dict[str, Any]:
        """Add one line; None values are left out. Returns what was written. On a full disk the line waits for space."""
        entry = {name: value for name, value in values.items() if value is not None} | {"time": round(time.time(), 3)}
        self._waiting.append(entry)
        if self._target.is_local:
            self._append()
        return entry

    def flush(self) -> None:
        """Make the file on an object store current."""
        if not self._target.is_local:
            self._rewrite()

    def _append(self) -> None:
        text = as_bytes(self._waiting)
        with open(self._target.path, "r+b", buffering=0) as file:
            file.seek(self._whole_bytes)  # over what a write that found no space has left
            try:
                file.truncate()
                if file.write(text) != len(text):
                    return
            except OSError as error:
                if error.errno not in DISK_IS_FULL:
                    raise
                return
        self._whole_bytes += len(text)
        self._waiting.clear()

    def _rewrite(self) -> None:
        content = as_bytes(self._waiting)
        self._target.write_bytes(content)
        if self._target.is_local:
            self._whole_bytes = len(content)
            self._waiting.clear()
