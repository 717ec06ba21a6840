"""Renders conversations with a chat template, and finds in the text what the assistant is to be trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from qlora_ray.config import ConfigError
from qlora_ray.data.formats import BadRecord, Messages

# For models without a chat template. The answer is closed by the tokenizer's own end-of-sequence token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}\n"
    "{% else %}### {{ message.role | capitalize }}:\n{{ message.content }}\n\n"
    "{% if message.role == 'user' %}### Assistant:\n{% endif %}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if message.role == 'assistant' %}<|im_end|>{{ eos_token if eos_token != '<|im_end|>' }}\n"
    "{% else %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = {"plain": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE}


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]  # [start, end) in characters, of what is trained on
    is_closed: bool  # the template ends the last answer with a special token


@dataclass(frozen=True)
class _Shape:
    """How the template renders a sequence of roles: piece, content, piece, content, ..., piece."""

    pieces: tuple[str, ...]
    turns: tuple[int, ...]  # the turns whose contents stand between the pieces
    lead: dict[int, int]  # by assistant turn: characters before its content that the assistant says, too
    tail: dict[int, int]  # and after it: what closes the turn
    is_closed: bool


def find_template(name: str | None) -> str | None:
    """The template text behind `data.chat_template`: a name or a file; None is the tokenizer's own. ConfigError."""
    if name is None or name in NAMED:
        return name and NAMED[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"data.chat_template={name}: no such file, and not a name. Names: {', '.join(NAMED)}; "
            "leave it out for the tokenizer's own."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.chat_template={name}: not UTF-8 (byte {error.start}).") from None


def render(tokenizer, messages: Messages, *, for_generation: bool = False) -> str:
    """The template's text; with for_generation it ends where the assistant begins to speak. Raises BadRecord."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_generation)
    except TemplateError as error:
        raise BadRecord("the chat template refuses it", str(error)) from error


class ChatTemplate:
    """A tokenizer's template, and what it has shown of itself.

    The template renders each role sequence once with placeholders: that tells which characters around a content are
    fixed. A conversation whose rendering is those pieces and its contents needs one rendering; any other gets one more
    for each answer, with a placeholder in its place: what then differs is the answer.
    """

    def __init__(self, tokenizer, train_on: str):
        self._tokenizer, self._train_on = tokenizer, train_on
        self._has_generation_tags = "endgeneration" in tokenizer.chat_template
        self._shape = lru_cache(maxsize=1000)(self._learn)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._closing_ids = special | {tokenizer.eos_token_id}

    def render_all(self, conversations: Sequence[Messages]) -> list[Rendered | BadRecord]:
        """Text and trained spans of each conversation, or why there is none."""
        from jinja2 import TemplateError

        texts: list[str | BadRecord]
        try:
            texts = self._tokenizer.apply_chat_template(list(conversations), tokenize=False) if conversations else []
        except TemplateError:
            texts = [_caught(render, self._tokenizer, conversation) for conversation in conversations]
        return [
            text if isinstance(text, BadRecord) else _caught(self._locate, conversation, text)
            for conversation, text in zip(conversations, texts, strict=True)
        ]

    def _locate(self, conversation: Messages, text: str) -> Rendered:
        shape = self._shape(tuple(turn["role"] for turn in conversation))
        answers = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant" and turn.get("weight") != 0]
        if self._train_on == "last_turn":
            answers = answers[-1:]
        if self._train_on == "everything":
            return Rendered(text, ((0, len(text)),), shape.is_closed)
        spans = _spans_by_shape(shape, conversation, text, answers)
        if spans is None:
            spans = [self._span_by_substitution(shape, conversation, text, i) for i in answers]
        return Rendered(text, tuple(spans), shape.is_closed)

    def _span_by_substitution(self, shape: _Shape, conversation: Messages, text: str, i: int) -> tuple[int, int]:
        stand_in = _placeholder(i)
        other = render(
            self._tokenizer, [*conversation[:i], {**conversation[i], "content": stand_in}, *conversation[i + 1 :]]
        )
        before, found, after = other.partition(stand_in)
        start, end = len(before) - shape.lead[i], len(text) - len(after)
        if not found or text[:start] != before[:start] or not text.endswith(after) or end < start:
            raise BadRecord("the chat template renders other turns differently with this answer")
        return start, end + shape.tail[i]

    def _learn(self, roles: tuple[str, ...]) -> _Shape:
        skeleton = [{"role": role, "content": _placeholder(i)} for i, role in enumerate(roles)]
        text = render(self._tokenizer, skeleton)
        pieces, turns, rest = [], [], text
        for i, turn in enumerate(skeleton):
            piece, found, after = rest.partition(turn["content"])
            if found:
                pieces.append(piece)
                turns.append(i)
                rest = after
        pieces.append(rest)
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        if not set(answers) <= set(turns):
            raise BadRecord("the chat template leaves out what the assistant says")
        places = {i: place for place, i in enumerate(turns)}
        lead = {i: self._lead(skeleton, text, i, pieces[places[i]]) for i in answers}
        tail = {i: self._tail(skeleton, i, pieces[places[i] + 1]) for i in answers}
        if self._has_generation_tags:
            marked = self._generation_spans(skeleton)
            for i in answers:
                content = text.index(_placeholder(i))
                begin, end = next((s for s in marked if s[0] <= content < s[1]), (content - lead[i], 0))
                lead[i], tail[i] = content - begin, max(tail[i], end - content - len(_placeholder(i)))
        closing = self._tokenizer(pieces[-1], add_special_tokens=False)["input_ids"]
        return _Shape(tuple(pieces), tuple(turns), lead, tail, not self._closing_ids.isdisjoint(closing))

    def _lead(self, skeleton: Messages, text: str, i: int, piece: str) -> int:
        """Characters between where the assistant begins to speak and its content, e.g. of an empty think block."""
        content = text.index(_placeholder(i))
        prompt = render(self._tokenizer, skeleton[:i], for_generation=True)
        agree = _num_common(prompt, text)
        if content - len(piece) <= agree <= content:
            return content - agree
        # Earlier turns look different here: go by the text that the generation prompt adds.
        added = prompt.removeprefix(render(self._tokenizer, skeleton[:i]))
        return len(piece) - piece.rindex(added) - len(added) if added in piece else 0

    def _tail(self, skeleton: Messages, i: int, piece: str) -> int:
        """Characters after a content that close the turn."""
        closing = render(self._tokenizer, skeleton[: i + 1]).partition(_placeholder(i))[2].rstrip("\n")
        return _num_common(closing, piece)

    def _generation_spans(self, skeleton: Messages) -> list[tuple[int, int]]:
        """Characters between the template's own {% generation %} tags."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[skeleton], chat_template=self._tokenizer.chat_template, return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )  # fmt: skip
        return rendered[1][0]


def _spans_by_shape(
    shape: _Shape, conversation: Messages, text: str, answers: list[int]
) -> list[tuple[int, int]] | None:
    """Spans where the text is the shape's pieces and the contents as they are, or stripped; else None."""
    contents = [conversation[i]["content"] for i in shape.turns]
    for shown in (contents, [content.strip() for content in contents]):
        parts = [part for pair in zip(shape.pieces, shown, strict=False) for part in pair] + [shape.pieces[-1]]
        if "".join(parts) == text:
            ends = list(accumulate(map(len, parts)))
            end = {i: ends[2 * place + 1] for place, i in enumerate(shape.turns)}
            length = dict(zip(shape.turns, map(len, shown), strict=True))
            return [(end[i] - length[i] - shape.lead[i], end[i] + shape.tail[i]) for i in answers]
    return None


def _caught(function, *arguments) -> Any:
    try:
        return function(*arguments)
    except BadRecord as reason:
        return reason


def _placeholder(i: int) -> str:
    return f"Zq{i}qZ"


def _num_common(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
