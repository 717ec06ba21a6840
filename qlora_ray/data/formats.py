"""Turns a record into messages: the one place that knows the shapes people bring.

Messages are chat turns (see turns.py), which the chat template renders; or raw texts, which it does not touch: one
{role: text}, or a {role: prompt} and a {role: completion}.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from qlora_ray.data.turns import MEDIA, ROLES, TURN_FIELDS, Messages, check_question, check_turns, make_calls
from qlora_ray.errors import BadRecord, ConfigError

RAW_ROLES = ("text", "prompt", "completion")
SHAREGPT_ROLES = {
    **ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant",
    "bot": "assistant", "function_call": "assistant", "tool_call": "assistant", "function_response": "tool",
    "tool_response": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")


def alpaca(record: dict[str, Any]) -> Messages:
    """instruction, optional input and system, output (Stanford Alpaca's field names)."""
    output = _text(record, "output")
    return [
        *_system(record),
        {"role": "user", "content": _instruction(record)},
        {"role": "assistant", "content": output},
    ]


def messages(record: dict[str, Any]) -> Messages:
    """`messages`: a list of {role, content}, as OpenAI has them; `tools` beside it (or `functions`).

    `weight: 0` on an assistant turn keeps it out of the loss.
    """
    return check_turns(record.get("messages"), "messages", tools_of(record))


def sharegpt(record: dict[str, Any]) -> Messages:
    """`conversations`: a list of {from: human|gpt|system|function_call|observation, value}; `system` and `tools`."""
    turns = record.get("conversations")
    if isinstance(turns, str):
        raise BadRecord("`conversations` is a text, not a list of turns")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("`conversations` is not a list of turns")
    renamed: Messages = []
    for turn in turns:
        if not isinstance(turn, dict) or str(turn.get("from", turn.get("role"))) not in SHAREGPT_ROLES:
            raise BadRecord("a turn is not {from: human|gpt|system|function_call|observation, value: text}")
        renamed.append(_renamed(turn))
        if len(renamed) > 1 and renamed[-1].get("tool_calls") and renamed[-2]["role"] == "assistant":
            calls = renamed.pop()["tool_calls"]  # of the same turn
            renamed[-1] = {**renamed[-1], "tool_calls": [*renamed[-1].get("tool_calls", []), *calls]}
    return check_turns(_system(record) + renamed, "conversations", tools_of(record))


def prompt_completion(record: dict[str, Any]) -> Messages:
    """`prompt` and `completion`: two raw texts that follow each other as they are, or two lists of turns."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return check_turns(prompt + completion, "prompt + completion", tools_of(record))
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
# The fields that each reads; of the rest unused_fields tells.
FIELDS = {
    "alpaca": {"instruction", "input", "output", "system"},
    "messages": {"messages", "tools", "functions"},
    "sharegpt": {"conversations", "system", "tools", "functions"},
    "prompt_completion": {"prompt", "completion", "tools", "functions"},
    "text": {"text"},
}
LABELS = ("label", "kto_tag")  # whether an answer is desirable: TRL's name, and LLaMA-Factory's
TURNS_IN = {"messages": ("messages",), "sharegpt": ("conversations",), "prompt_completion": ("prompt", "completion")}
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
    if format in FORMATS or format == "auto":
        _refuse_other_kinds(record)
    name = detect(record) if format == "auto" else format
    turns = FORMATS[name](record) if name in FORMATS else _by_function(record, name)
    for turn in turns:
        _refuse_half_characters(turn["content"])
        if len(turn) > 2:
            _refuse_half_characters(json.dumps(turn, ensure_ascii=False))
    return turns, name


def to_question(record: dict[str, Any]) -> Messages:
    """Messages of a record that is to be answered: {prompt}, {messages, tools} or {instruction}. Raises BadRecord."""
    if "messages" in record:
        turns = check_question(record["messages"], "messages", tools_of(record))
    elif "prompt" in record or "instruction" in record:
        asked = {"instruction": record["prompt"]} if "prompt" in record else record
        turns = check_question([{"role": "user", "content": _instruction(asked)}], "prompt", tools_of(record))
    else:
        raise BadRecord("no `prompt`, `messages` or `instruction`")
    _refuse_half_characters(json.dumps(turns, ensure_ascii=False))
    return turns


def detect(record: dict[str, Any]) -> str:
    """Name of the format whose fields a record has. Raises BadRecord."""
    for field, name in DETECTED_BY.items():
        if record.get(field) is not None:
            return name
    raise BadRecord("no format has these fields", f"found {', '.join(map(str, list(record)[:8])) or 'none'}")


def unused_fields(record: dict[str, Any], name: str) -> list[str]:
    """Fields of a record, and of its turns, that look like content and that its format does not read."""
    if name not in FIELDS:
        return []
    found = [str(field) for field in record.keys() - FIELDS[name] if _is_content(record[field])]
    for field in TURNS_IN.get(name, ()):
        turns = record[field] if isinstance(record.get(field), list) else []
        for turn in turns:
            if len(turn) > 2:
                more = turn.keys() - TURN_FIELDS - {"from", "value"}
                found += [f"{field}[].{key}" for key in more if _is_content(turn[key])]
    return sorted(set(found))


def tools_of(record: dict[str, Any]) -> Any:
    """What a record says may be called, in whatever shape; `functions` is the older name."""
    return record.get("tools") or record.get("functions")


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


def call(record: dict[str, Any], name: str) -> Any:
    """What the function `package.module:function` makes of a record. Raises BadRecord for what it cannot."""
    function, _ = load_function(name)
    try:
        return function(record)
    except BadRecord:
        raise
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise BadRecord(f"{name} raises {type(error).__name__}", str(error)) from error


def _by_function(record: dict[str, Any], name: str) -> Messages:
    made = call(record, name)
    if isinstance(made, dict):  # {messages, tools}
        return check_turns(made.get("messages"), name, tools_of(made))
    if isinstance(made, list) and made and all(isinstance(turn, dict) for turn in made):
        roles = tuple(turn.get("role") for turn in made)
        if roles == ("text",):
            return text({"text": made[0].get("content")})
        if roles == ("prompt", "completion"):
            return prompt_completion({turn["role"]: turn.get("content") for turn in made})
    return check_turns(made, name)


def _refuse_other_kinds(record: dict[str, Any]) -> None:
    if record.get("rejected") is not None or record.get("rejected_response") is not None:
        raise BadRecord(
            "a preference record (chosen, rejected): training.objective=sft takes single answers; set dpo, or keep the "
            "chosen"
        )
    if record.get("text") is None and any(isinstance(record.get(name), bool) for name in LABELS):
        raise BadRecord(
            "an answer with a label true or false: training.objective=sft takes single answers; set kto, or keep the "
            "desirable ones without it"
        )
    for field in record:
        if str(field).removesuffix("s") in MEDIA and field != "file" and record[field]:
            raise BadRecord(
                "a multi-modal record (pictures, sound, video or files): only text can be trained on", field
            )


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Bytes that are not UTF-8 are read as these; any other surrogate was written so, as \ud800 in JSON.
        was_bytes = "\udc80" <= text[error.start] <= "\udcff"
        raise BadRecord("not UTF-8" if was_bytes else "a text holds half of a surrogate pair") from None


def _renamed(turn: dict[str, Any]) -> dict[str, Any]:
    said_by, value = str(turn.get("from", turn.get("role"))), turn.get("value", turn.get("content"))
    more = {key: turn[key] for key in turn.keys() & TURN_FIELDS - {"role", "content"}}
    if said_by not in CALLS:
        return {**more, "role": SHAREGPT_ROLES[said_by], "content": value}
    try:
        calls = make_calls(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError) as error:
        raise BadRecord("a function_call is not JSON {name, arguments}", str(error)) from None
    return {**more, "role": "assistant", "content": "", "tool_calls": calls}


def _is_content(value: Any) -> bool:
    if isinstance(value, str):
        return len(value.split(None, 3)) > 2
    if isinstance(value, list | tuple):
        return any(isinstance(one, dict) or _is_content(one) for one in value)
    return isinstance(value, dict) and any(_is_content(one) for one in value.values())


def _instruction(record: dict[str, Any]) -> str:
    instruction, extra = _text(record, "instruction"), record.get("input") or ""
    if not isinstance(extra, str):
        raise BadRecord("`input` is not a text")
    return f"{instruction}\n\n{extra}" if extra.strip() else instruction


def _system(record: dict[str, Any]) -> Messages:
    return [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        raise BadRecord(f"no `{field}`")
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"`{field}` is empty or not a text")
    return value
