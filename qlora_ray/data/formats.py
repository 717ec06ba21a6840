"""Turns a record into messages: the one place that knows the shapes people bring.

Messages are chat turns ({role: system|user|assistant, content}), which the chat template renders; or raw texts, which
it does not touch: one {role: text}, or a {role: prompt} and a {role: completion}.
"""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from qlora_ray.config import ConfigError

Messages = list[dict[str, Any]]
ROLES = ("system", "user", "assistant")
RAW_ROLES = ("text", "prompt", "completion")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip


class BadRecord(ValueError):
    """A record that cannot be trained on. The message is the reason: one of few; `detail` is what differs."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


def alpaca(record: dict[str, Any]) -> Messages:
    """instruction, optional input and system, output (Stanford Alpaca's field names)."""
    instruction, output = _text(record, "instruction"), _text(record, "output")
    extra = record.get("input") or ""
    if not isinstance(extra, str):
        raise BadRecord("`input` is not a text")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [*_system(record), {"role": "user", "content": prompt}, {"role": "assistant", "content": output}]


def messages(record: dict[str, Any]) -> Messages:
    """`messages`: a list of {role, content}; user and assistant alternate, an optional system message first.

    OpenAI's `weight: 0` on an assistant turn keeps it out of the loss.
    """
    return check_turns(record.get("messages"), "messages")


def sharegpt(record: dict[str, Any]) -> Messages:
    """`conversations`: a list of {from: human|gpt|system, value}; an optional `system` beside it."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("`conversations` is not a list of turns")
    if not all(isinstance(turn, dict) and str(turn.get("from")) in SHAREGPT_ROLES for turn in turns):
        raise BadRecord("a turn is not {from: human|gpt|system, value: text}")
    renamed = [{"role": SHAREGPT_ROLES[str(turn["from"])], "content": turn.get("value")} for turn in turns]
    return check_turns(_system(record) + renamed, "conversations")


def prompt_completion(record: dict[str, Any]) -> Messages:
    """`prompt` and `completion`: two raw texts that follow each other as they are, or two lists of turns."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return check_turns(prompt + completion, "prompt + completion")
    return [
        {"role": "prompt", "content": _text(record, "prompt")},
        {"role": "completion", "content": _text(record, "completion")},
    ]


def text(record: dict[str, Any]) -> Messages:
    """`text`: continued pretraining. Every token is trained on; long texts become several samples."""
    return [{"role": "text", "content": _text(record, "text")}]


FORMATS: dict[str, Callable[[dict[str, Any]], Messages]] = {
    "alpaca": alpaca, "messages": messages, "sharegpt": sharegpt, "prompt_completion": prompt_completion, "text": text,
}  # fmt: skip
# The first whose field a record has.
DETECTED_BY = {
    "messages": "messages", "conversations": "sharegpt", "completion": "prompt_completion", "instruction": "alpaca",
    "output": "alpaca", "prompt": "prompt_completion", "text": "text",
}  # fmt: skip


def to_messages(record: Any, format: str) -> Messages:
    """Apply the named format, or with "auto" the one whose fields the record has. Raises BadRecord."""
    return convert(record, format)[0]


def convert(record: Any, format: str) -> tuple[Messages, str]:
    """The messages of a record, and the format that it has. Raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord("the record is not a JSON object")
    name = detect(record) if format == "auto" else format
    turns = FORMATS[name](record) if name in FORMATS else _by_function(record, name)
    for turn in turns:
        try:
            turn["content"].encode()
        except UnicodeEncodeError as error:
            # Bytes that are not UTF-8 are read as these; any other surrogate was written so, as \ud800 in JSON.
            was_bytes = "\udc80" <= turn["content"][error.start] <= "\udcff"
            raise BadRecord("not UTF-8" if was_bytes else "a text holds half of a surrogate pair") from None
    return turns, name


def detect(record: dict[str, Any]) -> str:
    """Name of the format whose fields a record has. Raises BadRecord."""
    for field, name in DETECTED_BY.items():
        if record.get(field) is not None:
            return name
    raise BadRecord("no format has these fields", f"found {', '.join(map(str, list(record)[:8])) or 'none'}")


def check_turns(turns: Any, field: str) -> Messages:
    """The turns with role, content and weight alone, checked. Raises BadRecord."""
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"`{field}` is not a list of turns")
    checked = [_turn(turn) for turn in turns]
    roles = [turn["role"] for turn in checked]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise BadRecord("roles must alternate user, assistant and end with the assistant")
    if any(not turn["content"].strip() for turn in checked if turn["role"] == "assistant"):
        raise BadRecord("an assistant turn is empty")
    if all(turn.get("weight") == 0 for turn in checked if turn["role"] == "assistant"):
        raise BadRecord("every assistant turn has weight 0")
    return checked


def load_function(name: str) -> tuple[Callable[[dict[str, Any]], Messages], ModuleType]:
    """The function behind `package.module:function`, and its module. Raises ConfigError."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # a console script's path lacks it, `python -m`'s has it
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"data.format={name}: cannot be imported: {error}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"data.format={name}: {module_name} has no function {function_name}.")
    return function, module


def _by_function(record: dict[str, Any], name: str) -> Messages:
    function, _ = load_function(name)
    try:
        made = function(record)
    except BadRecord:
        raise
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise BadRecord(f"{name} raises {type(error).__name__}", str(error)) from error
    if isinstance(made, list) and made and all(isinstance(turn, dict) for turn in made):
        roles = tuple(turn.get("role") for turn in made)
        if roles == ("text",):
            return text({"text": made[0].get("content")})
        if roles == ("prompt", "completion"):
            return prompt_completion({turn["role"]: turn.get("content") for turn in made})
    return check_turns(made, name)


def _turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise BadRecord("a turn is not {role: system|user|assistant, content: text}")
    content, weight = turn.get("content"), turn.get("weight")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] if isinstance(part.get("text"), str) else "" for part in content)
    if not isinstance(content, str):
        raise BadRecord("a turn is not {role: system|user|assistant, content: text}")
    if weight not in (None, 0, 1):
        raise BadRecord("a turn's `weight` is not 0 or 1")
    return {"role": turn["role"], "content": content} | ({"weight": 0} if weight == 0 else {})


def _system(record: dict[str, Any]) -> Messages:
    return [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        raise BadRecord(f"no `{field}`")
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"`{field}` is empty or not a text")
    return value
