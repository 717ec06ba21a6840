"""Renders conversations, finds in the text what the assistant is to be trained on, and what of the record is not there.

A conversation's kind is its roles and what each turn holds (a thought, so many calls, ...). The template renders each
kind once with stand-ins: that tells which characters around the texts are fixed. A conversation whose rendering is
those pieces and its own texts needs one rendering; any other gets more for each answer, with stand-ins in its place:
what then differs is the answer.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from qlora_ray.data.forms import TOOL_NAME, Renderer
from qlora_ray.data.missing import (
    CALL,
    EARLIER_THOUGHT,
    NAME,
    NO_STOP,
    OTHER_PROMPT,
    SAID_BY,
    THOUGHT,
    TOOLS,
    lacking_of,
    lacks_of,
)  # fmt: skip
from qlora_ray.data.shape import LEFT_OUT, Leaf, Shape, Span, ends_of, leaf_of, places_of_leaves, starts_of_leaves
from qlora_ray.data.stand_ins import (
    PART_OF_ARGUMENTS,
    STAND_IN,
    kind_of,
    skeleton_of,
    stand_in,
    stand_in_arguments,
    stand_in_for,
    stand_ins_of,
)  # fmt: skip
from qlora_ray.data.turns import Messages, split_tools
from qlora_ray.errors import BadRecord

# A turn beyond the first is opened and closed as an earlier one with the same pieces and the same turns near it: to
# render each prefix of a conversation of thousands of turns would take minutes.
FIRST_TURNS, NEAR = 64, 6


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]  # [start, end) in characters, of what is trained on
    is_closed: bool  # the template ends the last answer with a special token
    starts: tuple[int, ...] = ()  # where the assistant begins to speak, each time
    missing: tuple[str, ...] = ()  # kinds of what the record has and the text has not


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
            {"role": "user", "content": stand_in("q", 0)},
            {"role": "assistant", "content": stand_in("q", 1)},
        )
        self.unused_opening = ""
        try:
            prompt = self.renderer.render([asked], for_generation=True)
            texts = [
                self.renderer.render([asked, {**answer, **more}])
                for more in ({}, {"reasoning_content": stand_in("t", 1)})
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
        turns, shape = split_tools(conversation)[1], self._shape(kind_of(conversation))
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
        shape, turns = self._shape(kind_of(conversation)), split_tools(conversation)[1]
        places = places_of_leaves(shape, turns, text)
        if places is not None:
            spans = {
                i: (places[first][0] - shape.lead[i], places[last][1] + shape.tail[i])
                for i, (first, last) in shape.ends.items()
            }
            return spans, shape.lacks
        spans = {i: self._span(shape, conversation, text, i) for i in shape.ends}
        lacks = {(i, what) for i, turn in enumerate(turns) for what in lacking_of(turn, text, spans.get(i))}
        return spans, frozenset(lacks | {(i, what) for i, what in shape.lacks if what == "tools"})

    def _span(self, shape: Shape, conversation: Messages, text: str, i: int) -> Span:
        """Where a turn stands, by rendering others in its place."""
        place = len(conversation) - len(split_tools(conversation)[1]) + i
        other = [*conversation[:place], stand_in_for(conversation[place], i), *conversation[place + 1 :]]
        rendered = self.renderer.render(other)
        found = [match.span() for match in stand_ins_of(rendered, i)]
        if not found:
            raise BadRecord(LEFT_OUT)
        before, after = rendered[: found[0][0]], rendered[found[-1][1] :]
        first, last = (shape.leaves[k][1] for k in shape.ends[i])
        if first in "qt":
            start = len(before) - shape.lead[i]
        else:
            opening = shape.pieces[shape.ends[i][0]]
            opening = opening[len(opening) - shape.lead[i] :] + leaf_of(conversation[place], first, 0)
            start = self._start(other[:place], before, opening)
        if last in "qt":
            end = len(text) - len(after) + shape.tail[i]
        else:
            upto = self.renderer.render(other[: place + 1])
            end = len(text) - len(after) + self._num_closing(upto[_last(stand_ins_of(upto, i)) :], after)
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

    def _learn(self, kind: tuple) -> Shape:
        skeleton = skeleton_of(kind)
        text = self.renderer.render(skeleton)
        pieces, leaves, rest = [], [], 0
        for match in STAND_IN.finditer(text):
            what, turn, call = (match[1], match[2], match[3]) if match[1] else ("a", match[4], match[5])
            pieces.append(text[rest : match.start()])
            leaves.append((int(turn, 36), what, int(call, 36)))
            rest = match.end()
        pieces.append(text[rest:])
        turns = split_tools(skeleton)[1]
        ends = ends_of(turns, leaves)
        at = starts_of_leaves(pieces, text)
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
        lacks = lacks_of(turns, text) | ({(0, "tools")} if kind[0] and not tools else set())
        no_stop = {i for i, (_, last) in ends.items() if not self.stops(pieces[last + 1][: tail[i]])}
        return Shape(
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
        last = stand_in_arguments(i, call) if what == "a" else stand_in(what, i, call)
        return self._num_closing(text.partition(last)[2], piece)

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
