"""What this package raises on purpose, each with words for the user. Everything else is a bug, or the machine's."""

__all__ = [
    "BadRecord",
    "BrokenCheckpoint",
    "ConfigError",
    "DamagedFile",
    "GuardError",
    "ProcessDied",
    "QloraRayError",
    "Stop",
    "TooLong",
    "WorkersFailed",
]


class QloraRayError(Exception):
    """The root of them all."""


class ConfigError(QloraRayError, ValueError):
    """The user asked for something impossible; the message names the key, the value, the rule and a way out."""


class BrokenCheckpoint(ConfigError):
    """A checkpoint whose files are not those that its manifest lists."""


class TooLong(ConfigError):
    """A prompt that the context has no room for."""


class BadRecord(QloraRayError, ValueError):
    """A record that cannot be trained on. The message is the reason: one of few; `detail` is what differs."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


class DamagedFile(QloraRayError, ValueError):
    """A data file that stops being what it claims to be."""


class ProcessDied(QloraRayError, RuntimeError):
    """A process of our own that ended before its work; the message says which and how."""


class Stop(QloraRayError, RuntimeError):
    """A failure that trying again cannot mend, met by every worker at the same place; the message is the reason."""


class GuardError(QloraRayError, RuntimeError):
    """The model on this worker does not compute, or does not hold, what it should; the message is the reason."""


class WorkersFailed(QloraRayError, RuntimeError):
    """The workers that answer a file of prompts gave up; the message is the last line of why."""
