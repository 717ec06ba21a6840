"""Tokenizes texts word by word, where that surely gives the tokens that the tokenizer gives.

Most words have come before, and looking up their tokens takes a fraction of the time of making them. But a text may be
cut only where the tokenizer itself never looks across: at its special tokens, and where its pattern of words ends one
whatever stands around it. That is known of the patterns below (tests/unit/test_words.py tries every short text), and
of no other: a tokenizer of another kind is not taken.
"""

import json
import re
from array import array
from collections.abc import Sequence
from typing import Any

MOST_BYTES = 64 << 20  # of the words that are kept, and their tokens
BYTES_PER_WORD = 160  # two objects, and their place in a dict

# Each match is a word, together they are the text. A cut comes before a space that a letter follows, after a line that
# a letter or digit ends and a letter follows, and between a letter and a mark. Letters and digits are ASCII's.
SPACED = re.compile(
    r"""
    [\s\S] [^ \n,.;:!?)]*+
    (?: (?: [ ](?![A-Za-z])  |  (?<![A-Za-z0-9])\n  |  \n(?![A-Za-z])  |  (?<![A-Za-z])[,.;:!?)] )  [^ \n,.;:!?)]*+ )*+
    (?: (?<=[A-Za-z0-9])\n(?=[A-Za-z]) )?
    """,
    re.VERBOSE,
)
# A cut comes between an ASCII letter and another ASCII character that follows it.
LETTERS = re.compile(r"(?:[^A-Za-z]++[A-Za-z]*+|[A-Za-z]++)(?:[^\x00-\x7f][^A-Za-z]*+[A-Za-z]*+)*+")

UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE, SHORT_FORMS = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
MARKS, SPACES = r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{MARKS}|\s+(?!\S)|\s+"
LLAMA3 = rf"{SHORT_FORMS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{MARKS}[\r\n]*|{SPACES}"
QWEN2 = rf"{SHORT_FORMS}|{BEFORE}\p{{L}}+|\p{{N}}|{MARKS}[\r\n]*|{SPACES}"
QWEN35 = rf"{SHORT_FORMS}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
GPT_OSS = (
    rf"{BEFORE}{UPPER}*{LOWER}+{SHORT_FORMS}?|{BEFORE}{UPPER}+{LOWER}*{SHORT_FORMS}?|\p{{N}}{{1,3}}|{MARKS}[\r\n/]*|"
    + SPACES
)
TEKKEN = rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{MARKS}[\r\n/]*|{SPACES}"  # Mistral's
EMBEDDED = r"\p{Han}|\p{N}|[\p{L}&&[^\p{Han}]]+|[^\p{L}\p{N}]+"
# Where a tokenizer's pattern lets a text be cut.
WORDS = {
    GPT2: SPACED, LLAMA3: SPACED, QWEN2: SPACED, QWEN35: SPACED, GPT_OSS: SPACED, TEKKEN: SPACED, EMBEDDED: LETTERS,
}  # fmt: skip
DIGITS = (r"\p{N}{1,3}", r"\p{N}")  # may be cut out before: that joins nothing


class Words:
    """A tokenizer's backend, and the tokens of the words that it has met."""

    def __init__(self, backend: Any, word: re.Pattern):
        self._backend, self._find = backend, word.findall
        added = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")").split
        self._special = {text: array("i", [number]).tobytes() for text, number in added.items()}
        self._known = dict(self._special)
        self._num_bytes = 0

    def encode(self, texts: Sequence[str]) -> list[array]:
        """Token ids of each text."""
        words = [self._words(text) for text in texts]
        new = list(set().union(*words) - self._known.keys())
        for word, encoding in zip(new, self._backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self._known[word] = array("i", encoding.ids).tobytes()
            self._num_bytes += len(word) + len(self._known[word]) + BYTES_PER_WORD
        known = self._known.__getitem__
        made = [array("i", b"".join(map(known, of_text))) for of_text in words]
        if self._num_bytes > MOST_BYTES:
            self._known, self._num_bytes = dict(self._special), 0
        return made

    def _words(self, text: str) -> list[str]:
        words: list[str] = []
        for i, part in enumerate(self._split(text)):
            words += [part] if i % 2 else self._find(part)
        return words


def words_of(tokenizer) -> Words | None:
    """A tokenizer's words; None where texts cannot be cut for sure."""
    backend = tokenizer.backend_tokenizer
    model, normalizer = backend.model, backend.normalizer
    if type(model).__name__ != "BPE" or model.dropout or backend.encode_special_tokens:
        return None
    if normalizer is not None and json.loads(normalizer.__getstate__())["type"] != "NFC":  # which looks at no space
        return None
    if any(
        token.normalized or token.single_word or token.lstrip or token.rstrip
        for token in backend.get_added_tokens_decoder().values()
    ):
        return None
    word = _word_of(json.loads(backend.pre_tokenizer.__getstate__())) if backend.pre_tokenizer is not None else None
    return None if word is None else Words(backend, word)


def _word_of(pre_tokenizer: dict[str, Any]) -> re.Pattern | None:
    """Where a pre-tokenizer lets a text be cut."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    found: list[re.Pattern] = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"] and step is steps[-1]:
            found += [SPACED] if step["use_regex"] else []
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = step["pattern"].get("Regex")
            if pattern not in WORDS and pattern not in DIGITS:
                return None
            found += [WORDS[pattern]] if pattern in WORDS else []
        elif step["type"] != "Digits":
            return None
    return found[0] if found else None
