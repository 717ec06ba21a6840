"""Turns a record into chat messages: the one place that knows the shapes people bring."""

from collections.abc import Callable
from typing import Any

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")


class BadRecord(ValueError):
    """A record that cannot be trained on; the message is the reason."""


def alpaca(record: dict[str, Any]) -> Messages:
    """instruction, optional input and system, output (Stanford Alpaca's field names)."""
    instruction, output = _text(record, "instruction"), _text(record, "output")
    extra = record.get("input") or ""
    if not isinstance(extra, str):
        raise BadRecord("`input` is not a text")
    system = [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": output}]


def messages(record: dict[str, Any]) -> Messages:
    """`messages`: a list of {role, content}; user and assistant alternate, an optional system message first."""
    turns = record.get("messages")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("`messages` is not a list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str) or turn.get("role") not in ROLES:
            raise BadRecord("a turn is not {role: system|user|assistant, content: text}")
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise BadRecord("roles must alternate user, assistant and end with the assistant")
    if any(not turn["content"].strip() for turn in turns if turn["role"] == "assistant"):
        raise BadRecord("an assistant turn is empty")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


FORMATS: dict[str, Callable[[dict[str, Any]], Messages]] = {"alpaca": alpaca, "messages": messages}


def to_messages(record: Any, format: str) -> Messages:
    """Apply the named format, or with "auto" the one whose fields the record has. Raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord("the record is not a JSON object")
    if format == "auto":
        format = "messages" if "messages" in record else "alpaca"
    turns = FORMATS[format](record)
    for turn in turns:
        try:
            turn["content"].encode()
        except UnicodeEncodeError:  # JSON's \ud800 escapes can write what no UTF-8 text holds
            raise BadRecord("a text holds half of a surrogate pair") from None
    return turns


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        raise BadRecord(f"no `{field}`")
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"`{field}` is empty or not a text")
    return value
