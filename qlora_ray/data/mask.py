"""Renders conversations, finds in the text what the assistant is to be trained on, and what of the record is not there.

A conversation's kind is its roles and what each turn holds (a thought, so many calls, ...). The template renders each
kind once with stand-ins: that tells which characters around the texts are fixed. A conversation whose rendering is
those pieces and its own texts needs one rendering; any other gets more for each answer, with stand-ins in its place:
what then differs is the answer.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from qlora_ray.data.forms import TOOL, TOOL_NAME, Renderer, json_text, split_thought
from qlora_ray.data.turns import Messages, split_tools
from qlora_ray.errors import BadRecord

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

# A stand-in: what it is for (q content, t thought, n name, f a function's name, i an id), the turn, and which call.
STAND_IN = re.compile(r'Z([qtnfi])(\w{4})(\w{2})Z|\{"Za(\w{4})(\w{2})Z": "Zv\w{6}Z"\}')
PART_OF_ARGUMENTS = re.compile(r"Z[av]\w{6}Z")
# A turn beyond the first is opened and closed as an earlier one with the same pieces and the same turns near it: to
# render each prefix of a conversation of thousands of turns would take minutes.
FIRST_TURNS, NEAR = 64, 6
Leaf = tuple[int, str, int]  # turn, what, call; the what of arguments is a
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]  # [start, end) in characters, of what is trained on
    is_closed: bool  # the template ends the last answer with a special token
    starts: tuple[int, ...] = ()  # where the assistant begins to speak, each time
    missing: tuple[str, ...] = ()  # kinds of what the record has and the text has not


@dataclass(frozen=True)
class _Shape:
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


class ChatTemplate:
    """A tokenizer's template, and what it has shown of itself."""

    def __init__(self, tokenizer, train_on: str = "all_assistant_turns", keep_thoughts: str = "template"):
        self.renderer = Renderer(tokenizer)
        self._train_on, self._keep_thoughts = train_on, keep_thoughts
        self._shape = lru_cache(maxsize=1000)(self._learn)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._closing = tuple(special | {tokenizer.eos_token})
        tokens = sorted((str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._tokens = re.compile("(" + ("|".join(map(re.escape, tokens)) or "(?!)") + ")")
        self._words = re.compile(self._tokens.pattern + r"|\s")
        self.unused_opening = self._find_unused_opening()

    def render_all(self, conversations: Sequence[Messages]) -> list[list[Rendered] | BadRecord]:
        """Text and trained spans of each conversation, or why there is none.

        Several where keep_thoughts is "all" and the template leaves out earlier thoughts: one for each of these.
        """
        conversations = [self.renderer.normal(conversation) for conversation in conversations]
        return [
            text if isinstance(text, BadRecord) else _caught(self._rendered, conversation, text)
            for conversation, text in zip(conversations, self.renderer.render_all(conversations), strict=True)
        ]

    def prompt(self, conversation: Messages) -> Rendered:
        """The text up to where the assistant begins to speak, and where it began before. Raises BadRecord."""
        conversation = self.renderer.normal(conversation)
        text = self._prompt(conversation)
        starts: tuple[int, ...] = ()
        if any(turn["role"] == "assistant" for turn in conversation):
            spans, _ = self._locate(conversation, self.renderer.render(conversation))
            starts = tuple(start for start, _ in spans.values())
        return Rendered(text, (), False, starts)

    def closing(self) -> str:
        """What the template ends an answer with."""
        shape = self._shape((False, ("user", "assistant")))
        return shape.pieces[-1][: shape.tail[1]]

    def _prompt(self, conversation: Messages) -> str:
        text = self.renderer.render(conversation, for_generation=True)
        return text.removesuffix(self.unused_opening) if self.unused_opening else text

    def _find_unused_opening(self) -> str:
        """What the generation prompt ends with and no answer begins with; "" where answers begin as it says."""
        asked, answer = (
            {"role": "user", "content": _stand_in("q", 0)},
            {"role": "assistant", "content": _stand_in("q", 1)},
        )
        self.unused_opening = ""
        try:
            prompt = self.renderer.render([asked], for_generation=True)
            texts = [
                self.renderer.render([asked, {**answer, **more}])
                for more in ({}, {"reasoning_content": _stand_in("t", 1)})
            ]
        except BadRecord:
            return ""
        return "" if any(text.startswith(prompt) for text in texts) else prompt[_num_common(prompt, texts[0]) :]

    def _rendered(self, conversation: Messages, text: str) -> list[Rendered]:
        tools, turns = split_tools(conversation)
        trained = self._trained(turns)
        if not trained:
            raise BadRecord(f"nothing to train on with data.train_on={self._train_on}")
        made, hidden = self._one(conversation, text, trained)
        if not hidden or self._keep_thoughts == "template":
            return [made]
        rest = [i for i in trained if i not in hidden]
        several = [*self._one_a_thought(conversation, hidden)] + (
            [self._one(conversation, text, rest)[0]] if rest else []
        )
        return [replace(one, missing=tuple(kind for kind in one.missing if kind != EARLIER_THOUGHT)) for one in several]

    def _one(self, conversation: Messages, text: str, trained: list[int]) -> tuple[Rendered, list[int]]:
        """The conversation with these turns trained on; and which of them think without showing it, the last aside."""
        turns, shape = split_tools(conversation)[1], self._shape(_kind(conversation))
        spans, missing = self._locate(conversation, text)
        hidden = [i for i in trained if (i, "t") in missing and i < len(turns) - 1] if missing else []
        chosen = ((0, len(text)),) if self._train_on == "everything" else tuple(spans[i] for i in trained)
        kinds = {self._kind_of_missing(turns, place, trained) for place in missing} if missing else set()
        if shape.has_no_stop and any(i in shape.has_no_stop for i in trained if i < len(turns) - 1):
            kinds.add(NO_STOP)
        if not shape.opens_otherwise.isdisjoint(trained):
            kinds.add(OTHER_PROMPT)
        starts = tuple(start for start, _ in spans.values())
        return Rendered(text, chosen, shape.is_closed, starts, tuple(sorted(kinds - {""}))), hidden

    def _one_a_thought(self, conversation: Messages, hidden: list[int]) -> Iterator[Rendered]:
        """The conversation up to a turn whose thought is left out later, as it was when that was thought."""
        first, left = len(conversation) - len(split_tools(conversation)[1]), hidden
        while left:
            upto = conversation[: first + left[-1] + 1]
            text = self.renderer.render(upto)
            missing = self._locate(upto, text)[1]
            shown = [i for i in left if (i, "t") not in missing or i == left[-1]]
            yield self._one(upto, text, shown)[0]
            left = [i for i in left if i not in shown]

    def _trained(self, turns: Messages) -> list[int]:
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight") != 0]
        if self._train_on in ("tool_calls", "last_tool_call"):
            answers = [i for i in answers if turns[i].get("tool_calls")]
        if self._train_on == "last_exchange":
            asked = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
            answers = [i for i in answers if i > asked]
        return answers[-1:] if self._train_on in ("last_turn", "last_tool_call") else answers

    def _kind_of_missing(self, turns: Messages, place: tuple[int, str], trained: list[int]) -> str:
        i, what = place
        if what == "t":
            is_meant = i not in trained or (i < len(turns) - 1 and self.renderer.forms.thought is not None)
            return EARLIER_THOUGHT if is_meant else THOUGHT
        if what == "n":
            return NAME if turns[i]["role"] != "tool" else ""  # a result's name is that of the call
        return {"q": SAID_BY[turns[i]["role"]], "c": CALL, "tools": TOOLS}[what]

    def _locate(self, conversation: Messages, text: str) -> tuple[dict[int, Span], frozenset[tuple[int, str]]]:
        """What each assistant turn says, in characters; and (turn, what) that the text lacks."""
        shape, turns = self._shape(_kind(conversation)), split_tools(conversation)[1]
        places = _match(shape, turns, text)
        if places is not None:
            spans = {
                i: (places[first][0] - shape.lead[i], places[last][1] + shape.tail[i])
                for i, (first, last) in shape.ends.items()
            }
            return spans, shape.lacks
        spans = {i: self._span(shape, conversation, text, i) for i in shape.ends}
        lacks = {(i, what) for i, turn in enumerate(turns) for what in _lacking(turn, text, spans.get(i))}
        return spans, frozenset(lacks | {(i, what) for i, what in shape.lacks if what == "tools"})

    def _span(self, shape: _Shape, conversation: Messages, text: str, i: int) -> Span:
        """Where a turn stands, by rendering others in its place."""
        place = len(conversation) - len(split_tools(conversation)[1]) + i
        other = [*conversation[:place], _stand_in_for(conversation[place], i), *conversation[place + 1 :]]
        rendered = self.renderer.render(other)
        found = [match.span() for match in _stand_ins(rendered, i)]
        if not found:
            raise BadRecord(LEFT_OUT)
        before, after = rendered[: found[0][0]], rendered[found[-1][1] :]
        first, last = (shape.leaves[k][1] for k in shape.ends[i])
        if first in "qt":
            start = len(before) - shape.lead[i]
        else:
            opening = shape.pieces[shape.ends[i][0]]
            opening = opening[len(opening) - shape.lead[i] :] + _leaf(conversation[place], first, 0)
            start = self._start(other[:place], before, opening)
        if last in "qt":
            end = len(text) - len(after) + shape.tail[i]
        else:
            upto = self.renderer.render(other[: place + 1])
            end = len(text) - len(after) + self._num_closing(upto[_last(_stand_ins(upto, i)) :], after)
        if text[:start] != before[:start] or not text.endswith(after) or end < start:
            raise BadRecord("the chat template renders other turns differently with this answer")
        return start, end

    def _start(self, asked: Messages, before: str, opening: str) -> int:
        """Where the assistant begins to speak in a text that goes on after `before`; `opening` is how it begins."""
        prompt = self._prompt(asked)
        if before.startswith(prompt):
            return len(prompt)
        if opening and opening in before:
            return before.rindex(opening)
        # Earlier turns look different here: go by the text that the generation prompt adds.
        added = prompt.removeprefix(self.renderer.render(asked))
        return before.rindex(added) + len(added) if added in before else len(before)

    def _learn(self, kind: tuple) -> _Shape:
        skeleton = _skeleton(kind)
        text = self.renderer.render(skeleton)
        pieces, leaves, rest = [], [], 0
        for match in STAND_IN.finditer(text):
            what, turn, call = (match[1], match[2], match[3]) if match[1] else ("a", match[4], match[5])
            pieces.append(text[rest : match.start()])
            leaves.append((int(turn, 36), what, int(call, 36)))
            rest = match.end()
        pieces.append(text[rest:])
        turns = split_tools(skeleton)[1]
        ends = _ends(turns, leaves)
        at = _starts_of_leaves(pieces, text)
        lead, tail, opens_otherwise = {}, {}, set()
        seen: dict[tuple, tuple[int, bool, int]] = {}
        for i, (first, last) in ends.items():
            asked = skeleton[: len(skeleton) - len(turns) + i]
            around = kind[1][max(0, i - NEAR) : i + NEAR], pieces[first], pieces[last + 1], leaves[last][1]
            if i < FIRST_TURNS or around not in seen:
                opening = self._lead(asked, text, at[first][0], pieces[first])
                seen[around] = *opening, self._tail(skeleton[: len(asked) + 1], leaves[last], pieces[last + 1])
            lead[i], opens_as_prompt, tail[i] = seen[around]
            opens_otherwise |= set() if opens_as_prompt else {i}
        if self.renderer.has_generation_tags:
            self._heed_tags(skeleton, {i: (at[a][0], at[b][1]) for i, (a, b) in ends.items()}, lead, tail)
        tools = [k for k, piece in enumerate(pieces) if TOOL_NAME in piece]
        is_fixed = len(tools) < 2 and not any(PART_OF_ARGUMENTS.search(piece) for piece in pieces)
        lacks = _lacks(turns, text) | ({(0, "tools")} if kind[0] and not tools else set())
        no_stop = {i for i, (_, last) in ends.items() if not self.stops(pieces[last + 1][: tail[i]])}
        return _Shape(
            tuple(pieces), tuple(leaves), is_fixed, tools[0] if tools else None, ends, lead, tail,
            frozenset(opens_otherwise), frozenset(no_stop), frozenset(lacks), self.stops(pieces[-1]),
        )  # fmt: skip

    def _lead(self, asked: Messages, text: str, content: int, piece: str) -> tuple[int, bool]:
        """Characters between where the assistant begins to speak and its first leaf, e.g. of an empty think block.

        And whether it begins as generate's prompt ends.
        """
        prompt = self._prompt(asked)
        agree, first = _num_common(prompt, text), content - len(piece)
        if first <= agree <= content:
            if agree < min(len(prompt), content):  # amid a word or a token, maybe
                agree = first + max([0, *(match.end() for match in self._words.finditer(text[first:agree]))])
            return content - agree, agree == len(prompt)
        after_question = prompt[_last(list(STAND_IN.finditer(prompt))) :]
        if piece.startswith(after_question):  # earlier turns look different here: go by what follows the question
            return len(piece) - len(after_question), True
        return content - max(first, self._start(asked, text[:content], "")), True

    def _tail(self, upto: Messages, leaf: Leaf, piece: str) -> int:
        """Characters after a turn's last leaf that close the turn."""
        text = self.renderer.render(upto)
        i, what, call = leaf
        stand_in = _arguments(i, call) if what == "a" else _stand_in(what, i, call)
        return self._num_closing(text.partition(stand_in)[2], piece)

    def _num_closing(self, closing: str, piece: str) -> int:
        """Characters that what closes a last turn and what follows this one have in common, in whole tokens."""
        length = 0
        for unit in filter(None, self._tokens.split(closing)):
            if piece.startswith(unit, length):
                length += len(unit)
                continue
            if not self._tokens.fullmatch(unit):  # a text may end early, but not amid a line
                common = unit[: _num_common(unit, piece[length:])]
                length += len(common) if piece[length:] == common else common.rfind("\n") + 1
            break
        return len(piece[:length].rstrip())

    def _heed_tags(self, skeleton: Messages, at: dict[int, Span], lead: dict[int, int], tail: dict[int, int]) -> None:
        """Take what the template itself marks as generated, and what closes the turn after it."""
        marked = self.renderer.generation_spans(skeleton)
        for i, (first, last) in at.items():
            own = [(start, end) for start, end in marked if start <= last and first <= end]
            lead[i] = first - own[0][0] if own else 0
            tail[i] = max(tail[i], own[-1][1] - last) if own else tail[i]

    def stops(self, text: str) -> bool:
        """Whether a text ends with a token that ends an answer."""
        return text.rstrip().endswith(self._closing)


LEFT_OUT = "the chat template leaves out what the assistant says"


def _match(shape: _Shape, turns: Messages, text: str) -> list[Span] | None:
    """Places of the leaves, where the text is the shape's pieces and the turns' own texts in one of a few ways."""
    if not shape.is_fixed:
        return None
    values = [_leaf(turns[i], what, call) for i, what, call in shape.leaves]
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


def _as_they_are(shape: _Shape, turns: Messages, values: list[str]) -> list[str]:
    return values


def _stripped(shape: _Shape, turns: Messages, values: list[str]) -> list[str]:
    return [value.strip() for value in values]


def _answers_stripped(shape: _Shape, turns: Messages, values: list[str]) -> list[str]:
    return [
        value.strip() if turns[i]["role"] == "assistant" else value
        for (i, _, _), value in zip(shape.leaves, values, strict=True)
    ]


def _results_as_json(shape: _Shape, turns: Messages, values: list[str]) -> list[str]:
    return [
        json_text(value)[1:-1] if turns[i]["role"] == "tool" else value
        for (i, _, _), value in zip(shape.leaves, values, strict=True)
    ]


WAYS: tuple[Callable[[_Shape, Messages, list[str]], list[str]], ...] = (
    _as_they_are, _stripped, _answers_stripped, _results_as_json,
)  # fmt: skip


def _leaf(turn: dict[str, Any], what: str, call: int) -> str:
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


def _kind(conversation: Messages) -> tuple:
    """Roles, and what each turn holds; whether there are tools."""
    tools, turns = split_tools(conversation)
    return bool(tools), tuple(turn["role"] if len(turn) == 2 else _kind_of_turn(turn) for turn in turns)


def _kind_of_turn(turn: dict[str, Any]) -> tuple | str:
    calls = tuple("id" in call for call in turn.get("tool_calls", ()))
    more = "reasoning_content" in turn, calls, "name" in turn, "tool_call_id" in turn
    return (turn["role"], bool(turn["content"]), *more) if any(more) else turn["role"]


def _skeleton(kind: tuple) -> Messages:
    """A conversation of this kind that holds stand-ins."""
    has_tools, kinds = kind
    made: Messages = [{"role": "tools", "content": "", "tools": [TOOL]}] if has_tools else []
    for i, of_turn in enumerate(kinds):
        role, has_content, thinks, calls, has_name, has_id = (
            of_turn if isinstance(of_turn, tuple) else (of_turn, True, False, (), False, False)
        )
        turn: dict[str, Any] = {"role": role, "content": _stand_in("q", i) if has_content else ""}
        turn |= {"reasoning_content": _stand_in("t", i)} if thinks else {}
        turn |= {"name": _stand_in("n", i)} if has_name else {}
        turn |= {"tool_call_id": _stand_in("i", i)} if has_id else {}
        turn |= {"tool_calls": [_stand_in_call(i, call, known) for call, known in enumerate(calls)]} if calls else {}
        made.append(turn)
    return made


def _stand_in(what: str, turn: int, call: int = 0) -> str:
    """Nine characters, for some templates want ids of calls so."""
    return f"Z{what}{_digits(turn, 4)}{_digits(call, 2)}Z"


def _digits(number: int, count: int) -> str:
    if number >= 36**count:
        raise BadRecord("it has too many turns, or calls in one")
    return np.base_repr(number, 36).lower().zfill(count)


def _stand_in_call(i: int, call: int, has_id: bool) -> dict[str, Any]:
    function = {"name": _stand_in("f", i, call), "arguments": json.loads(_arguments(i, call))}
    return {**({"id": _stand_in("i", i, call)} if has_id else {}), "type": "function", "function": function}


def _arguments(i: int, call: int) -> str:
    return json_text({_stand_in("a", i, call): _stand_in("v", i, call)})


def _ends(turns: Messages, leaves: list[Leaf]) -> dict[int, tuple[int, int]]:
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


def _starts_of_leaves(pieces: list[str], text: str) -> list[Span]:
    """Characters [start, end) of each leaf."""
    places, at = [], 0
    for piece, match in zip(pieces, STAND_IN.finditer(text), strict=False):
        at += len(piece)
        places.append((at, match.end()))
        at = match.end()
    return places


def _lacks(turns: Messages, text: str) -> set[tuple[int, str]]:
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


def _lacking(turn: dict[str, Any], text: str, span: Span | None) -> Iterator[str]:
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


def _stand_in_for(turn: dict[str, Any], i: int) -> dict[str, Any]:
    """A turn with stand-ins for its texts, and else the same: other turns must not look different for it."""
    made, calls = dict(turn), [dict(call["function"]) for call in turn.get("tool_calls", ())]
    if turn["content"]:
        made["content"] = _stand_in("q", i)
    if "reasoning_content" in turn:
        made["reasoning_content"] = _stand_in("t", i)
    for j, function in enumerate(calls):
        function["arguments"] = {
            key: _stand_in("v", i, j) if isinstance(value, str) else value
            for key, value in function["arguments"].items()
        }
    if (
        calls
        and made == turn
        and not any(f"Zv{_digits(i, 4)}" in json_text(function["arguments"]) for function in calls)
    ):
        calls[-1]["name"] = _stand_in("f", i, len(calls) - 1)
    if calls:
        made["tool_calls"] = [
            {**call, "function": function} for call, function in zip(turn["tool_calls"], calls, strict=True)
        ]
    return made


def _stand_ins(text: str, i: int) -> list[re.Match]:
    return list(re.finditer(rf"Z[qtfv]{_digits(i, 4)}\w{{2}}Z", text))


def _last(matches: list[re.Match]) -> int:
    return matches[-1].end() if matches else 0


def _caught(function, *arguments) -> Any:
    try:
        return function(*arguments)
    except BadRecord as reason:
        return reason


def _num_common(a: str, b: str) -> int:
    """Characters that both begin with; in halves, for texts are long and Python's loops slow."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
