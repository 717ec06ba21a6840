"""The pieces of text that a template puts around a kind of conversation, and where its leaves stand between them."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from qlora_ray.data.forms import json_text
from qlora_ray.data.stand_ins import STAND_IN
from qlora_ray.data.turns import Messages
from qlora_ray.errors import BadRecord

Leaf = tuple[int, str, int]  # turn, what, call; the what of arguments is a
Span = tuple[int, int]
LEFT_OUT = "the chat template leaves out what the assistant says"


@dataclass(frozen=True)
class Shape:
    """How the template renders a kind of conversation: piece, leaf, piece, leaf, ..., piece."""

    pieces: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    is_fixed: bool  # whether a conversation can be the pieces and its own texts at all
    loose: int | None  # the piece that holds the tools, which may be any
    ends: dict[int, tuple[int, int]]  # by assistant turn: places of its first and last leaf
    lead: dict[int, int]  # characters before the first that the assistant says, too
    tail: dict[int, int]  # and after the last: what closes the turn
    opens_otherwise: frozenset[int]  # turns that do not begin as the generation prompt ends
    has_no_stop: frozenset[int]
    lacks: frozenset[tuple[int, str]]  # (turn, what) that does not show
    is_closed: bool


def places_of_leaves(shape: Shape, turns: Messages, text: str) -> list[Span] | None:
    """Places of the leaves, where the text is the shape's pieces and the turns' own texts in one of a few ways."""
    if not shape.is_fixed:
        return None
    values = [leaf_of(turns[i], what, call) for i, what, call in shape.leaves]
    for way in WAYS:
        shown = way(shape, turns, values)
        parts = [part for pair in zip(shape.pieces, shown, strict=False) for part in pair] + [shape.pieces[-1]]
        if shape.loose is not None:
            cut = 2 * shape.loose
            before, after = "".join(parts[:cut]), "".join(parts[cut + 1 :])
            num_between = len(text) - len(before) - len(after)
            if num_between < 0 or not text.startswith(before) or not text.endswith(after):
                continue
            parts[cut] = text[len(before) : len(before) + num_between]
        elif "".join(parts) != text:
            continue
        ends = list(accumulate(map(len, parts)))
        return list(zip(ends[0::2], ends[1::2], strict=False))
    return None


def _as_they_are(shape: Shape, turns: Messages, values: list[str]) -> list[str]:
    return values


def _stripped(shape: Shape, turns: Messages, values: list[str]) -> list[str]:
    return [value.strip() for value in values]


def _answers_stripped(shape: Shape, turns: Messages, values: list[str]) -> list[str]:
    return [
        value.strip() if turns[i]["role"] == "assistant" else value
        for (i, _, _), value in zip(shape.leaves, values, strict=True)
    ]


def _results_as_json(shape: Shape, turns: Messages, values: list[str]) -> list[str]:
    return [
        json_text(value)[1:-1] if turns[i]["role"] == "tool" else value
        for (i, _, _), value in zip(shape.leaves, values, strict=True)
    ]


WAYS: tuple[Callable[[Shape, Messages, list[str]], list[str]], ...] = (
    _as_they_are, _stripped, _answers_stripped, _results_as_json,
)  # fmt: skip


def leaf_of(turn: dict[str, Any], what: str, call: int) -> str:
    """The text of a turn that a leaf of its shape stands for."""
    if what == "q":
        return turn["content"]
    if what == "t":
        return turn["reasoning_content"]
    if what == "n":
        return turn["name"]
    if what == "i":
        return turn["tool_calls"][call]["id"] if "tool_calls" in turn else turn["tool_call_id"]
    function = turn["tool_calls"][call]["function"]
    return function["name"] if what == "f" else json_text(function["arguments"])


def ends_of(turns: Messages, leaves: list[Leaf]) -> dict[int, tuple[int, int]]:
    """Places of the first and last leaf of each assistant turn; what shows once more later does not count."""
    places: dict[int, list[int]] = defaultdict(list)  # by turn
    for leaf, place in {leaf: place for place, leaf in reversed(list(enumerate(leaves)))}.items():
        places[leaf[0]].append(place)
    ends = {}
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            if not places[i]:
                raise BadRecord(LEFT_OUT if turn["content"] else "the chat template leaves out tool calls")
            ends[i] = min(places[i]), max(places[i])
    return ends


def starts_of_leaves(pieces: list[str], text: str) -> list[Span]:
    """Characters [start, end) of each leaf."""
    places, at = [], 0
    for piece, match in zip(pieces, STAND_IN.finditer(text), strict=False):
        at += len(piece)
        places.append((at, match.end()))
        at = match.end()
    return places
