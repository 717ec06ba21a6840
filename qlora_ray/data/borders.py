"""Tokenizes texts so that a prompt alone has the tokens that it has in its row.

A tokenizer may join what ends a prompt with what begins an answer, or split the end of a prompt otherwise when more
follows. So a text is cut where an answer begins, and each part is tokenized alone: what generate sends is then what the
model has read in training.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from qlora_ray.data.mask import Rendered
from qlora_ray.data.shape import Span
from qlora_ray.data.words import Words


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text, and its spans in tokens: [start, end) of those that overlap the characters."""

    ids: array
    spans: list[Span]


@dataclass(frozen=True)
class _Part:
    """Tokens between two cuts, and where each stands in the text: no places where a token shows all edges."""

    ids: array
    offsets: list[Span]


class Borders:
    """A tokenizer's backend, and which of its tokens stand apart from any text around them."""

    def __init__(self, tokenizer, words: Words | None = None):
        self._backend, self._words = tokenizer.backend_tokenizer, words
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added = {str(token): (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._closings = tuple(text for text, (_, token) in self._added.items() if token.special)
        self._apart: dict[str, bool] = {}  # of the closings met
        self._newline = self._encode("\n").ids
        # A tokenizer may put a space before what begins a text, or drop one.
        self._heeds_beginning = any(
            self._encode("\n" + text).ids != self._newline + self._encode(text).ids for text in ("x y", " x")
        )

    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Tokens of each text and of its spans."""
        cuts = [(0, *(start for start in one.starts if start), len(one.text)) for one in rendered]
        closers = [self._closers(one, of_one) for one, of_one in zip(rendered, cuts, strict=True)]
        parts = [[one.text[a:b] for a, b in pairwise(of_one)] for one, of_one in zip(rendered, cuts, strict=True)]
        quick = [part for own, known in zip(parts, closers, strict=True) if known is not None for part in own]
        encoded = iter(self._encode_all(quick))
        made = []
        for one, of_one, own, known in zip(rendered, cuts, parts, closers, strict=True):
            if known is None:
                whole = [self._part(one.text, a, b) for a, b in pairwise(of_one)]
            else:
                whole = [_Part(next(encoded), []) for _ in own]
            made.append(_joined(one, of_one, whole, known or {}))
        return made

    def _closers(self, one: Rendered, cuts: tuple[int, ...]) -> dict[int, int] | None:
        """By edge of a span amid a part: the id of the token that ends there, the first such in the part.

        None where an edge has none, or where a part alone has other tokens than after what precedes it.
        """
        if self._heeds_beginning and len(cuts) > 2:
            return None
        found = {}
        for span in one.spans:
            for edge in span:
                if edge in cuts:
                    continue
                closer = self._closer(one.text, edge)
                start = cuts[bisect_right(cuts, edge) - 1]
                if not closer or one.text.find(closer, start) != edge - len(closer):
                    return None
                found[edge] = self._added[closer][0]
        return found

    def _closer(self, text: str, end: int) -> str:
        """The token that text[:end] ends with, if it is one whatever stands around it."""
        for closer, is_apart in self._apart.items():
            if text.endswith(closer, 0, end):
                return closer if is_apart else ""
        if text.endswith(self._closings, 0, end):
            met = max((closer for closer in self._closings if text.endswith(closer, 0, end)), key=len)
            self._apart[met] = self._stands_apart(met)
            return self._closer(text, end)
        return ""

    def _stands_apart(self, closer: str) -> bool:
        _, token = self._added[closer]
        starts = tuple(closer[:size] for size in range(1, len(closer)))
        others = (other for other in self._added if other != closer)
        overlaps = any(closer in other or other.endswith(starts) for other in others)
        return not (token.normalized or token.single_word or overlaps)

    def _part(self, text: str, start: int, end: int) -> _Part:
        """Tokens of text[start:end] as what precedes it leaves them: after the token there, or after a line's end."""
        lead = (self._closer(text, start) or "\n") if start else ""
        led = self._encode(lead + text[start:end])
        count = len(self._newline) if lead == "\n" else len(lead and [lead])
        if lead == "\n" and not self._begins_after_newline(led, count):
            lead, count, led = "", 0, self._encode(text[start:end])
        size = len(lead)
        return _Part(array("i", led.ids[count:]), [(max(0, a - size), b - size) for a, b in led.offsets[count:]])

    def _begins_after_newline(self, led: Any, count: int) -> bool:
        return led.ids[:count] == self._newline and (len(led) == count or led.token_to_chars(count)[0] >= 1)

    def _encode_all(self, texts: list[str]) -> list[array]:
        if self._words is not None:
            return self._words.encode(texts)
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [array("i", encoding.ids) for encoding in encoded]

    def _encode(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)


def _joined(one: Rendered, cuts: tuple[int, ...], parts: list[_Part], closers: dict[int, int]) -> Tokens:
    before = [0, *accumulate(len(part.ids) for part in parts)]

    def place(edge: int, is_start: bool) -> int:
        k = bisect_right(cuts, edge) - 1
        if cuts[k] == edge:
            return before[k]
        if edge in closers:
            return before[k] + parts[k].ids.index(closers[edge]) + 1
        if is_start:
            return before[k] + bisect_right(parts[k].offsets, edge - cuts[k], key=lambda offset: offset[1])
        return before[k] + bisect_left(parts[k].offsets, edge - cuts[k], key=lambda offset: offset[0])

    ids = parts[0].ids if len(parts) == 1 else array("i", b"".join(part.ids for part in parts))
    return Tokens(ids, [(place(start, True), place(end, False)) for start, end in one.spans])
