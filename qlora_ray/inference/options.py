"""Options of transformers' GenerationConfig as a user writes them: key=value, checked before a model is loaded."""

import contextlib
import difflib
import json
from pathlib import Path
from typing import Any

import yaml

from qlora_ray.data.turns import Messages, tools_turn
from qlora_ray.errors import BadRecord, ConfigError

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
# (least, most) of options that transformers itself checks only in the middle of answering, or not at all
LIMITS = {"max_new_tokens": (1, None), "num_beams": (1, None), "temperature": (1e-6, None), "top_p": (1e-6, 1),
          "top_k": (0, None), "min_p": (0, 1), "typical_p": (1e-6, 1), "repetition_penalty": (1e-6, None)}  # fmt: skip
WHOLE = ("max_new_tokens", "num_beams", "top_k")
OURS = ("pad_token_id", "eos_token_id", "return_dict_in_generate", "num_return_sequences", "use_cache")


def read_options(texts: list[str]) -> dict[str, Any]:
    """GenerationConfig options from key=value. A sampling option switches do_sample on. Raises ConfigError."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text!r}: an option is written name=value, e.g. max_new_tokens=64.")
        options[name] = yaml.safe_load(value)
        if isinstance(options[name], str):  # YAML 1.1 reads 1e-1 as a text
            with contextlib.suppress(ValueError):
                options[name] = float(options[name])
    if options:
        _validate(options)
    if any(options.get(name) is not None for name in SAMPLING):
        options.setdefault("do_sample", True)
    return options


def read_opening(tools: str | None, system: str | None) -> Messages:
    """What comes before the first question: the tools in a file (a JSON list, or {tools}), and a system message."""
    turns: Messages = []
    if tools is not None:
        try:
            value = json.loads(Path(tools).expanduser().read_text("utf-8"))
            turns += tools_turn(value.get("tools", value) if isinstance(value, dict) else value)
        except OSError as error:
            raise ConfigError(f"--tools {tools}: {error.strerror}.") from None
        except BadRecord as error:
            raise ConfigError(f"--tools {tools}: {error}.") from None
        except ValueError as error:
            raise ConfigError(f"--tools {tools}: not JSON: {error}.") from None
        if not turns:
            raise ConfigError(f"--tools {tools}: holds no tool.")
    return [*turns, *([{"role": "system", "content": system}] if system else [])]


def _validate(options: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - set(OURS)
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean {close[0]}?" if close else " See transformers' GenerationConfig."
            raise ConfigError(f"{name}: no such generation option.{hint}")
    for name in LIMITS.keys() & options.keys():
        value, (least, most) = options[name], LIMITS[name]
        kind = int if name in WHOLE else (int, float)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or value < least or (most is not None and value > most):
            what = "a whole number" if name in WHOLE else "a number"
            limit = f"of at least {least:g}" if most is None else f"between {least:g} and {most:g}"
            raise ConfigError(f"{name}={value}: must be {what} {limit}.")
    try:
        GenerationConfig(**options).validate()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{', '.join(options)}: {str(error).splitlines()[0]}") from None
