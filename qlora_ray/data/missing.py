"""What of a record does not show in its text, and what that is called."""

import json
from collections.abc import Iterator
from typing import Any

from qlora_ray.data.forms import json_text, split_thought
from qlora_ray.data.shape import Span
from qlora_ray.data.turns import Messages

# What can be missing from the rendering. Of the first few a run is only told; more of the others stops it.
EARLIER_THOUGHT, NO_STOP, OTHER_PROMPT = (
    "thoughts of earlier answers",
    "the token that ends an earlier answer",
    "the opening of the answer that generate's prompt has",
)
TOLD = (EARLIER_THOUGHT, NO_STOP, OTHER_PROMPT)
THOUGHT, CALL, TOOLS, NAME, ANSWER_TEXT = (
    "a thought that is to be trained on", "a tool call", "the tools", "a name", "what an assistant says",
)  # fmt: skip
SAID_BY = {"system": "a system message", "user": "what a user says", "tool": "a tool's result",
           "assistant": ANSWER_TEXT}  # fmt: skip


def lacks_of(turns: Messages, text: str) -> set[tuple[int, str]]:
    """(turn, what) of the stand-ins that a text lacks."""
    lacks = set()
    for i, turn in enumerate(turns):
        for what, field in (("q", "content"), ("t", "reasoning_content"), ("n", "name")):
            if turn.get(field) and turn[field] not in text:
                lacks.add((i, what))
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            shown = [*function["arguments"], *function["arguments"].values(), function["name"]]
            if not all(part in text for part in shown):
                lacks.add((i, "c"))
    return lacks


def lacking_of(turn: dict[str, Any], text: str, span: Span | None) -> Iterator[str]:
    """What of a turn does not show: of an assistant in what it says, of others anywhere."""
    said = text if span is None else text[slice(*span)]
    if turn.get("name") and turn["name"] not in text:
        yield "n"
    thought, content = turn.get("reasoning_content", ""), turn["content"]
    if span is not None and not thought and not _shows(content, said):
        thought, content = split_thought(content)
    if not _shows(content, said):
        yield "q"
    if not _shows(thought, said):
        yield "t"
    for call in turn.get("tool_calls", ()):
        function = call["function"]
        if function["name"] not in said or not all(_shows(text, said) for text in _texts_in(function["arguments"])):
            yield "c"


def _shows(value: str, text: str) -> bool:
    """Whether a value stands in a text: as it is, but for spaces; as JSON writes it; or as JSON of the same value."""
    value = value.strip()
    if value in text or json_text(value)[1:-1] in text or "".join(value.split()) in "".join(text.split()):
        return True
    try:
        return json_text(json.loads(value)) in text
    except (ValueError, RecursionError):
        return False


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json_text(value)
