"""What a conversation is here: turns, checked, whatever shape they came in.

A turn is {role, content}; content is a text, "" where nothing is said. Where the record has it there is more: name; of
an assistant weight (0 keeps it out of the loss), reasoning_content (its thought) and tool_calls, each {id, type:
function, function: {name, arguments}} with arguments as a mapping; of a tool tool_call_id. A first {role: tools, tools:
[...]} says what may be called; a last {role: rejected, turns: [...]} holds the other conversation of a pair (pairs.py).
"""

import json
from typing import Any

from qlora_ray.errors import BadRecord

Messages = list[dict[str, Any]]
ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool", "ipython": "tool", "observation": "tool",
}  # fmt: skip
THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
TURN_FIELDS = {
    "role", "content", "name", "weight", "tool_calls", "function_call", "tool_call_id", "type", *THOUGHT_FIELDS,
}  # fmt: skip
MEDIA = ("image", "audio", "video", "file")
NO_TURN = "a turn is not {role: system|user|assistant|tool, content: text}"


def check_turns(turns: Any, field: str, tools: Any = None) -> Messages:
    """The turns as this module says, after what may be called. Raises BadRecord."""
    checked = _checked(turns, field)
    if not _ends_well(checked) or checked[-1]["role"] != "assistant":
        raise BadRecord("roles must alternate user, assistant and end with the assistant")
    answers = [turn for turn in checked if turn["role"] == "assistant"]
    if any(not turn["content"].strip() and not turn.get("tool_calls") for turn in answers):
        raise BadRecord("an assistant turn is empty")
    if all(turn.get("weight") == 0 for turn in answers):
        raise BadRecord("every assistant turn has weight 0")
    return [*tools_turn(tools), *checked]


def check_question(turns: Any, field: str, tools: Any = None) -> Messages:
    """Turns that are to be answered: they end with a user or a tool; a last answer is left out. Raises BadRecord."""
    checked = _checked(turns, field)
    if checked[-1]["role"] == "assistant":
        checked.pop()
    if not checked or checked[-1]["role"] not in ("user", "tool"):
        raise BadRecord(f"`{field}` does not end with what the user or a tool said")
    return [*tools_turn(tools), *checked]


def split_tools(conversation: Messages) -> tuple[list[dict[str, Any]] | None, Messages]:
    """What may be called, and the turns."""
    if conversation[0]["role"] == "tools":
        return conversation[0]["tools"], conversation[1:]
    return None, conversation


def _checked(turns: Any, field: str) -> Messages:
    if isinstance(turns, str):
        raise BadRecord(f"`{field}` is a text, not a list of turns")
    if not isinstance(turns, list) or not turns:
        raise BadRecord(f"`{field}` is not a list of turns")
    return [_turn(turn) for turn in turns]


def _ends_well(turns: Messages) -> bool:
    """Whether turns follow each other as in a conversation: after a question answers, with tools' results between."""
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken == ["user", "assistant"] * (len(spoken) // 2):
        return bool(spoken)
    may_follow = {"": ("user",), "user": ("assistant",), "tool": ("tool", "assistant"), "assistant": ("user", "tool")}
    return all(role in may_follow.get(before, ()) for before, role in zip(["", *spoken], spoken, strict=False))


def _turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or turn["role"] not in ROLES:
        raise BadRecord(NO_TURN)
    role, content = ROLES[turn["role"]], turn.get("content")
    if len(turn) == 2 and isinstance(content, str):
        return {"role": role, "content": content}
    more = _extras(turn, role)
    if isinstance(content, list):
        content, thought = _join(content)
        if thought and role == "assistant":
            more.setdefault("reasoning_content", thought)
    if content is None and (more.get("tool_calls") or more.get("reasoning_content")):
        content = ""
    if role == "tool" and isinstance(content, dict | list | int | float):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise BadRecord(NO_TURN)
    return {"role": role, "content": content, **more}


def _extras(turn: dict[str, Any], role: str) -> dict[str, Any]:
    more: dict[str, Any] = {}
    weight, name = turn.get("weight"), turn.get("name")
    if weight not in (None, 0, 1):
        raise BadRecord("a turn's `weight` is not 0 or 1")
    if weight == 0:
        more["weight"] = 0
    if name:
        more["name"] = _text(name, "a turn's `name` is not a text")
    if role == "tool" and turn.get("tool_call_id"):
        more["tool_call_id"] = str(turn["tool_call_id"])
    if role == "assistant":
        thought = next((turn[field] for field in THOUGHT_FIELDS if turn.get(field)), None)
        if thought is not None and _text(thought, "a turn's thought is not a text").strip():
            more["reasoning_content"] = thought
        old = turn.get("function_call")
        calls = _parsed(turn.get("tool_calls"), "`tool_calls` is not JSON") or ([old] if old else [])
        if calls:
            more["tool_calls"] = make_calls(calls)
    return more


def make_calls(calls: Any) -> list[dict[str, Any]]:
    """Calls in one shape, came they bare or wrapped, with arguments as a mapping or as JSON. Raises BadRecord."""
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise BadRecord("`tool_calls` is not a list of calls")
    return [_call(_parsed(call, "a tool call is not JSON")) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRecord("a tool call is not {function: {name, arguments}}")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = _parsed(arguments, "a tool call's arguments are not a JSON object") or {}
    if not isinstance(arguments, dict):
        raise BadRecord("a tool call's arguments are not a JSON object")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": str(call["id"]), **made} if call.get("id") else made


def tools_turn(tools: Any) -> Messages:
    """What may be called, in whatever shape, as the turn that comes first; none where there is nothing."""
    tools = _parsed(tools, "`tools` is not JSON")
    if not tools:
        return []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise BadRecord("`tools` is not a list of tools")
    return [{"role": "tools", "content": "", "tools": [_tool(_parsed(tool, "a tool is not JSON")) for tool in tools]}]


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord("a tool is not {type: function, function: {name, description, parameters}}")
    if function is tool:
        return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    return {"type": "function", **tool}


def _join(parts: list[Any]) -> tuple[str, str]:
    """The text and the thought that content parts hold."""
    text: list[str] = []
    thought: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(medium in kind for medium in MEDIA):
            raise BadRecord("a multi-modal record (pictures, sound, video or files): only text can be trained on", kind)
        if not isinstance(part, dict) or kind not in ("text", "thinking", "reasoning"):
            raise BadRecord(NO_TURN, f"a content part of type {kind}" if kind else "")
        said = next((part[field] for field in (kind, "text") if isinstance(part.get(field), str)), "")
        (text if kind == "text" else thought).append(said)
    return "".join(text), "".join(thought)


def _parsed(value: Any, reason: str) -> Any:
    """What a JSON text holds; anything else stays as it is."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(reason, str(error)) from None


def _text(value: Any, reason: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(reason)
    return value
