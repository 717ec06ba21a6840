"""From a YAML file and its overrides to a config, or to words about what is wrong with them."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qlora_ray.config.data import DataSource
from qlora_ray.config.whole import Config
from qlora_ray.environment import hide_secrets
from qlora_ray.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply dotted `key.path=value` overrides, and validate.

    Raises ConfigError for whatever a user can get wrong.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return make_config(values)


def make_config(values: dict[str, Any]) -> Config:
    """Validate nested values. Raises ConfigError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def as_written(config: Config) -> dict[str, Any]:
    """Nested values that make this config again: as asked, for a base that is stored in 4 bits decides what was not."""
    quantization = config.quantization.model_dump(mode="json", exclude_unset=True)
    return {**config.model_dump(mode="json"), "quantization": quantization}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return dotted


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"-c {path}: no such file.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"-c {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"-c {path}: not UTF-8 text (byte {error.start}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"-c {path}:{where}: not YAML: {getattr(error, 'problem', error)}.") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"-c {path}: must hold sections such as `training:`, found a {type(values).__name__}.")
    # A section whose keys are all commented out is an empty one.
    sections = Config.model_fields.keys() - {"sweep"}  # which may be left out
    return {key: {} if value is None and key in sections else value for key, value in (values or {}).items()}


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written section.key=value, e.g. training.learning_rate=1e-4.")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section!r} is a value, not a section.")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[name] = text


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not DataSource:
                keys += _known_keys(kind, f"{prefix}{name}.")
    return keys


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = [str(part) for part in item["loc"]]
        key = ".".join(
            part for part in where if not re.match(r"(literal|function|constrained|list|mapping|bool|str|int)\b", part)
        )
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key.{_nearest(key)}")
        elif item["type"] == "value_error" and len(item["loc"]) < 2:  # from a section's own check: it names the key
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            rule = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key}={_shown(item['input'])}: {rule[0].lower() + rule[1:]}.")
    return "\n".join(dict.fromkeys(lines))


def _shown(value: Any) -> str:
    text = hide_secrets(str(value) if isinstance(value, str | int | float) else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(key: str) -> str:
    known = _known_keys()
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    last = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == last]
    named = same_name[:1] or close
    return f" Did you mean {named[0]}?" if named else f" Known sections: {', '.join(Config.model_fields)}."
