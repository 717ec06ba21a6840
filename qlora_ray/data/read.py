"""Reads a user's file into records. Says where it stops being what it claims to be."""

import json
from pathlib import Path
from typing import Any

from qlora_ray.config import ConfigError


def read_records(path: Path, key: str = "data.train_file") -> list[Any]:
    """Return the records of a JSON array or JSON Lines file, in file order.

    `key` names the config key in messages. Raises ConfigError for a missing, empty, non-UTF-8 or non-JSON file.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{key}={path}: no such file.") from None
    except IsADirectoryError:
        raise ConfigError(f"{key}={path}: is a folder; name a .json or .jsonl file.") from None
    except PermissionError:
        raise ConfigError(f"{key}={path}: not readable by this user.") from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ConfigError(
            f"{key}={path}: not UTF-8 at line {line}, column {column}. Convert it, e.g. with iconv."
        ) from None
    if not text.strip():
        raise ConfigError(f"{key}={path}: the file is empty.")
    if text.lstrip().startswith("["):
        return _parse(text, key, path)
    return [_parse(line, key, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(text: str, key: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ConfigError(f"{key}={path}: not JSON at line {line}, column {error.colno}: {error.msg}.") from None
    except RecursionError:
        raise ConfigError(f"{key}={path}: the JSON from line {first_line} on is nested too deeply.") from None
