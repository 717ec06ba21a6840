"""What is wrong with one record by itself: an answer that is cut, open or missing, a damaged text, unknown tokens."""

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_ray.data.pairs import halves
from qlora_ray.data.tokenize import Encoder, Sample, prompt_ids
from qlora_ray.data.turns import Messages

CLOSING_TOKENS = 4  # a template may write a line break after the token that ends an answer
REPLACED = re.compile("[\ufffd\x80-\x9f]")  # and C1 controls, which UTF-8 read as Latin-1 is full of
SPEAKERS = ("assistant", "completion")


@dataclass(frozen=True)
class Base:
    """What the base says of tokens."""

    encoder: Encoder
    stop_ids: frozenset[int]
    unseen_ids: frozenset[int] | None  # that it was not trained on; None where that cannot be told


def can_tell_mojibake() -> bool:
    """Whether ftfy is installed."""
    return importlib.util.find_spec("ftfy") is not None


def text_of(messages: Messages) -> str:
    """All that a record says, and calls, turn by turn."""
    return "\n".join(part for turn in messages for part in _said(turn) if part)


def faults_of(messages: Messages, samples: list[Sample], base: Base) -> Iterator[tuple[str, str]]:
    """(kind, detail) of each fault; kinds as in quality.KINDS."""
    if any(sample.truncated for sample in samples):
        yield "cut", ""
    if missing := sorted({kind for sample in samples for kind in sample.missing}):
        yield "left_out", "; ".join(missing)
    if damage := _damage(text_of(messages)):
        yield "garbled", damage
    unseen = base.unseen_ids or frozenset()
    if not all(unseen.isdisjoint(sample.ids) for sample in samples):
        ids = sorted(unseen.intersection(*(sample.ids for sample in samples[:1])))[:3]
        yield "unseen_token", " ".join(base.encoder.tokenizer.convert_ids_to_tokens(ids))
    if messages[0]["role"] != "text":
        both = halves(messages)
        found: dict[str, str] = {}  # of a record each once
        for number, half in enumerate(both):
            of_half = samples if len(both) == 1 else samples[number : number + 1]
            found = dict(_faults_of_answers(half, of_half, base)) | found
        yield from found.items()


def _said(turn: dict[str, Any]) -> Iterator[str]:
    yield turn["content"]
    for call in turn.get("tool_calls", ()):
        yield f"{call['function']['name']} {json.dumps(call['function']['arguments'], ensure_ascii=False)}"
    for field in ("reasoning_content", "name"):
        yield turn.get(field, "")
    for other in turn.get("turns", ()):
        yield from _said(other)
    for tool in turn.get("tools", ()):
        yield json.dumps(tool, ensure_ascii=False)


def _faults_of_answers(messages: Messages, samples: list[Sample], base: Base) -> Iterator[tuple[str, str]]:
    answers = [ids for sample in samples for ids in _answers(sample, base.stop_ids)]
    if any(base.stop_ids.isdisjoint(ids[-CLOSING_TOKENS:]) for ids in answers):
        yield "unclosed", ""
    if any(sum(token not in base.stop_ids for token in ids) < 2 for ids in answers):
        yield "short", ""
    if any(_is_unfinished(turn["content"]) for turn in messages if turn["role"] in SPEAKERS):
        yield "unfinished", ""
    prompt, row = prompt_ids(base.encoder.tokenizer, messages[:-1]), samples[-1].ids
    differs = next((i for i, (a, b) in enumerate(zip(prompt, row, strict=False)) if a != b), None)
    if differs is not None:
        around = slice(max(0, differs - 2), differs + 3)
        alone, inside = (base.encoder.tokenizer.decode(list(ids[around])) for ids in (prompt, row))
        yield "other_prompt", f"from token {differs}: {alone!r} alone, {inside!r} in the row"


def _answers(sample: Sample, stop_ids: frozenset[int]) -> list[Sequence[int]]:
    """Tokens of each answer that is trained on to its end."""
    spans: list[tuple[int, int]] = []
    for start, end in sample.spans:
        is_closing = stop_ids.issuperset(sample.ids[start:end])
        if spans and start - spans[-1][1] <= (CLOSING_TOKENS if is_closing else 0):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    if sample.truncated and spans and spans[-1][1] == len(sample.ids):
        spans.pop()
    return [sample.ids[start:end] for start, end in spans]


def _is_unfinished(answer: str) -> bool:
    return len(re.findall(r"^\s*```", answer, re.M)) % 2 == 1 or answer.count("<think>") > answer.count("</think>")


def _damage(text: str) -> str:
    if text.isascii():
        return ""
    if found := REPLACED.search(text):
        return f"U+{ord(found[0]):04X} in {text[max(0, found.start() - 10) : found.end() + 10]!r}"
    if can_tell_mojibake():
        from ftfy.badness import is_bad

        return "wrongly decoded" if is_bad(text) else ""
    return ""
