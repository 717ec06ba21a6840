"""Conversations of stand-ins: what a template makes of each kind of conversation is learnt from them."""

import json
import re
from typing import Any

import numpy as np

from qlora_ray.data.forms import TOOL, json_text
from qlora_ray.data.turns import Messages, split_tools
from qlora_ray.errors import BadRecord

# A stand-in: what it is for (q content, t thought, n name, f a function's name, i an id), the turn, and which call.
STAND_IN = re.compile(r'Z([qtnfi])(\w{4})(\w{2})Z|\{"Za(\w{4})(\w{2})Z": "Zv\w{6}Z"\}')
PART_OF_ARGUMENTS = re.compile(r"Z[av]\w{6}Z")


def kind_of(conversation: Messages) -> tuple:
    """Roles, and what each turn holds; whether there are tools."""
    tools, turns = split_tools(conversation)
    return bool(tools), tuple(turn["role"] if len(turn) == 2 else _kind_of_turn(turn) for turn in turns)


def _kind_of_turn(turn: dict[str, Any]) -> tuple | str:
    calls = tuple("id" in call for call in turn.get("tool_calls", ()))
    more = "reasoning_content" in turn, calls, "name" in turn, "tool_call_id" in turn
    return (turn["role"], bool(turn["content"]), *more) if any(more) else turn["role"]


def skeleton_of(kind: tuple) -> Messages:
    """A conversation of this kind that holds stand-ins."""
    has_tools, kinds = kind
    made: Messages = [{"role": "tools", "content": "", "tools": [TOOL]}] if has_tools else []
    for i, of_turn in enumerate(kinds):
        role, has_content, thinks, calls, has_name, has_id = (
            of_turn if isinstance(of_turn, tuple) else (of_turn, True, False, (), False, False)
        )
        turn: dict[str, Any] = {"role": role, "content": stand_in("q", i) if has_content else ""}
        turn |= {"reasoning_content": stand_in("t", i)} if thinks else {}
        turn |= {"name": stand_in("n", i)} if has_name else {}
        turn |= {"tool_call_id": stand_in("i", i)} if has_id else {}
        turn |= {"tool_calls": [_stand_in_call(i, call, known) for call, known in enumerate(calls)]} if calls else {}
        made.append(turn)
    return made


def stand_in(what: str, turn: int, call: int = 0) -> str:
    """Nine characters, for some templates want ids of calls so."""
    return f"Z{what}{_digits(turn, 4)}{_digits(call, 2)}Z"


def stand_in_for(turn: dict[str, Any], i: int) -> dict[str, Any]:
    """A turn with stand-ins for its texts, and else the same: other turns must not look different for it."""
    made, calls = dict(turn), [dict(call["function"]) for call in turn.get("tool_calls", ())]
    if turn["content"]:
        made["content"] = stand_in("q", i)
    if "reasoning_content" in turn:
        made["reasoning_content"] = stand_in("t", i)
    for j, function in enumerate(calls):
        function["arguments"] = {
            key: stand_in("v", i, j) if isinstance(value, str) else value
            for key, value in function["arguments"].items()
        }
    if (
        calls
        and made == turn
        and not any(f"Zv{_digits(i, 4)}" in json_text(function["arguments"]) for function in calls)
    ):
        calls[-1]["name"] = stand_in("f", i, len(calls) - 1)
    if calls:
        made["tool_calls"] = [
            {**call, "function": function} for call, function in zip(turn["tool_calls"], calls, strict=True)
        ]
    return made


def stand_ins_of(text: str, i: int) -> list[re.Match]:
    """Where a turn's stand-ins are in a text."""
    return list(re.finditer(rf"Z[qtfv]{_digits(i, 4)}\w{{2}}Z", text))


def stand_in_arguments(i: int, call: int) -> str:
    """JSON of the arguments that stand for those of a call."""
    return json_text({stand_in("a", i, call): stand_in("v", i, call)})


def _stand_in_call(i: int, call: int, has_id: bool) -> dict[str, Any]:
    function = {"name": stand_in("f", i, call), "arguments": json.loads(stand_in_arguments(i, call))}
    return {**({"id": stand_in("i", i, call)} if has_id else {}), "type": "function", "function": function}


def _digits(number: int, count: int) -> str:
    if number >= 36**count:
        raise BadRecord("it has too many turns, or calls in one")
    return np.base_repr(number, 36).lower().zfill(count)
