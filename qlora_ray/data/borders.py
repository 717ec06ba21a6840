"""Tokenizes texts so that a prompt alone has the tokens that it has in its row.

A tokenizer may join what ends a prompt with what begins an answer, or split the end of a prompt otherwise when more
follows. Where it does, the text is cut at that border and each part tokenized alone: what generate sends is then what
the model has read in training.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qlora_ray.data.mask import Rendered

FAR_TOKENS, FAR_CHARACTERS = 64, 400  # further back than this nothing is looked for that keeps tokens apart


@dataclass(frozen=True)
class Part:
    """Tokens of a text; an encoding of the tokenizers library is another."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # in characters

    def token_to_chars(self, i: int) -> tuple[int, int]:
        """[start, end) in characters of token `i`."""
        return self.offsets[i]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text, and where each stands in it."""

    ids: list[int]
    part: Any  # a Part, or an encoding of the tokenizers library

    def span(self, start: int, end: int) -> tuple[int, int]:
        """[first, last) tokens that overlap characters [start, end)."""
        first = self.first_after(start)
        last = bisect_left(range(len(self.ids)), end, lo=first, key=lambda i: self.part.token_to_chars(i)[0])
        return first, last

    def first_after(self, start: int) -> int:
        """The first token that ends after a character. Offsets only grow, so it can be bisected."""
        return bisect_right(range(len(self.ids)), start, key=lambda i: self.part.token_to_chars(i)[1])


class Borders:
    """A tokenizer's backend, and whether it keeps prompts and answers apart."""

    def __init__(self, tokenizer):
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added = set(tokenizer.added_tokens_decoder)
        self._newline = self._encode("\n").ids
        self._ids_within = lru_cache(maxsize=10_000)(lambda text: self._within(text).ids)

    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Tokens of each text."""
        encodings = self._backend.encode_batch([one.text for one in rendered], add_special_tokens=False)
        return [self._checked(one, encoding) for one, encoding in zip(rendered, encodings, strict=True)]

    def _checked(self, rendered: Rendered, encoding) -> Tokens:
        whole = Tokens(encoding.ids, encoding)
        cuts = [start for start in rendered.starts if start and not self._is_border(rendered.text, whole, start)]
        if not cuts:
            return whole
        part, end = Part(encoding.ids, encoding.offsets), len(rendered.text)
        for start in reversed(cuts):
            part = self._cut(rendered.text[:end], part, start)
            end = start
        return Tokens(part.ids, part)

    def _cut(self, text: str, part: Part, start: int) -> Part:
        """The tokens with none across `start`: only those between the added tokens around it are made anew.

        `text` ends at the next cut, which stays.
        """
        ids, offsets = part.ids, part.offsets
        first = bisect_right(offsets, start, key=lambda offset: offset[1])
        before = next((i for i in range(first - 1, -1, -1) if ids[i] in self._added), 0)
        last = bisect_left(offsets, len(text), key=lambda offset: offset[0])
        after = next((i for i in range(first, last) if ids[i] in self._added and offsets[i][0] >= start), last)
        begin, end = offsets[before][0] if before else 0, offsets[after][0] if after < last else len(text)
        left, right = self._encode(text[begin:start]), self._within(text[start:end])
        made = [(a + begin, b + begin) for a, b in left.offsets] + [(a + start, b + start) for a, b in right.offsets]
        return Part(ids[:before] + left.ids + right.ids + ids[after:], offsets[:before] + made + offsets[after:])

    def _is_border(self, text: str, whole: Tokens, start: int) -> bool:
        """Whether the text up to `start` has the same tokens alone."""
        encoding = whole.part
        first = whole.first_after(start)
        if first < len(encoding) and encoding.token_to_chars(first)[0] < start:
            return False
        if first and encoding.ids[first - 1] in self._added:
            return True
        near = self._last_kept_apart(text, encoding, first)
        if near and self._ids_within(text[encoding.token_to_chars(near)[0] : start]) == encoding.ids[near:first]:
            return True
        return self._encode(text[:start]).ids == encoding.ids[:first]

    def _last_kept_apart(self, text: str, encoding, first: int) -> int:
        """The last token before `first` that what precedes it cannot change: after an added token or an empty line."""
        ids = encoding.ids
        for i in range(first - 1, max(0, first - FAR_TOKENS), -1):
            if ids[i] in self._added:
                return i
        end = encoding.token_to_chars(first - 1)[0] if first else 0
        line = text.rfind("\n\n", max(0, end - FAR_CHARACTERS), end) + 2
        place = bisect_left(range(first), line, key=lambda i: encoding.token_to_chars(i)[0])
        return place if line > 1 and place < first and encoding.token_to_chars(place)[0] == line else 0

    def _encode(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)

    def _within(self, text: str) -> Part:
        """Tokens of a text that other text precedes: a tokenizer may put a space before what begins a text."""
        led = self._encode("\n" + text)
        count = len(self._newline)
        if led.ids[:count] == self._newline and (len(led) == count or led.token_to_chars(count)[0] >= 1):
            offsets = [(max(0, a - 1), b - 1) for a, b in led.offsets[count:]]
            return Part(led.ids[count:], offsets)
        alone = self._encode(text)
        return Part(alone.ids, alone.offsets)
