"""Texts tokenized word by word have the tokens that they have as a whole."""

import itertools
import random

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from qlora_ray.config import base_model_path
from qlora_ray.data import words
from qlora_ray.data.tokenize import load_tokenizer
from qlora_ray.data.words import GPT2, LETTERS, SPACED, WORDS, Words, words_of

SIGNS = "aBs 1\n\r\t',./_é中"


def split_by(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def cuts_of(steps, text: str) -> set[int]:
    """Where a pre-tokenizer ends a word of a text."""
    return {end for _, (_, end) in steps.pre_tokenize_str(text)}


def assert_words_are_cut_as_the_text(steps, word, text: str):
    pieces, at, found = word.findall(text), 0, set()
    assert "".join(pieces) == text
    for piece in pieces:
        found |= {at + end for end in cuts_of(steps, piece)}
        at += len(piece)
    assert found == cuts_of(steps, text), repr(text)


@pytest.mark.parametrize("pattern", WORDS, ids=range(len(WORDS)))
def test_every_short_text_falls_into_the_same_words_when_it_is_cut(pattern):
    steps = split_by(pattern)
    for size, signs in ((4, SIGNS), (5, "aB1 \n',é")):
        for text in map("".join, itertools.product(signs, repeat=size)):
            assert_words_are_cut_as_the_text(steps, WORDS[pattern], text)


@pytest.mark.parametrize("pattern", WORDS, ids=range(len(WORDS)))
def test_long_texts_fall_into_the_same_words_also_after_digits_are_cut_out(pattern):
    pick = random.Random(0)
    digits = [pre_tokenizers.Digits(individual_digits=True), *map(split_by, words.DIGITS)]
    for first in [None, *digits]:
        steps = split_by(pattern) if first is None else pre_tokenizers.Sequence([first, split_by(pattern)])
        for _ in range(100):
            text = "".join(pick.choices(SIGNS + "xyzXYZ  \u0301\u00a0ß", k=80))
            assert_words_are_cut_as_the_text(steps, WORDS[pattern], text)


def trained(pre_tokenizer, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>", "<|end|>x", "<tool>"], show_progress=False)
    tokenizer.train_from_iterator(texts(300), trainer)
    return tokenizer


def texts(count: int) -> list[str]:
    pick = random.Random(1)
    parts = ["the ", "fox", ", and", ".\n", "\n\n", " don't", " 12", "naïve cafe\u0301", "東京", "<|end|>", "<|end|>x",
             "<tool>", "  ", "\tThen", "🙂", "a" * 90]  # fmt: skip
    return ["".join(pick.choices(parts, k=30)) for _ in range(count)]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["bare", "nfc"])
@pytest.mark.parametrize("pattern", WORDS, ids=range(len(WORDS)))
def test_tokens_are_those_of_the_whole_text(pattern, normalizer):
    steps = [split_by(r"\p{N}"), split_by(pattern), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer = trained(pre_tokenizers.Sequence(steps), normalizer)
    known = words_of(type("Fast", (), {"backend_tokenizer": tokenizer}))
    wanted = [one.ids for one in tokenizer.encode_batch(texts(500), add_special_tokens=False)]
    assert [made.tolist() for made in known.encode(texts(500))] == wanted
    assert [made.tolist() for made in known.encode(texts(500))] == wanted  # and from what it knows


def test_words_are_forgotten_when_they_are_many(monkeypatch):
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    monkeypatch.setattr(words, "MOST_BYTES", 100)
    known = Words(tokenizer, SPACED)
    for text in texts(50):
        assert known.encode([text])[0].tolist() == tokenizer.encode(text, add_special_tokens=False).ids
        assert len(known._known) < 60


def test_the_embedded_base_and_gpt2_are_tokenized_word_by_word():
    assert words_of(load_tokenizer(base_model_path("embedded"), None))._find == LETTERS.findall
    gpt2 = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert words_of(type("Fast", (), {"backend_tokenizer": gpt2}))._find == WORDS[GPT2].findall


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        split_by("[a-z ]+"),
        pre_tokenizers.Split(Regex(GPT2), "removed"),
        pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False), split_by(GPT2)]),
    ],
    ids=["none", "metaspace", "whitespace", "leading", "bytes", "unknown", "removed", "after"],
)
def test_tokenizers_that_may_look_across_a_cut_are_not_taken(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    assert words_of(type("Fast", (), {"backend_tokenizer": tokenizer})) is None


@pytest.mark.parametrize("flag", ["normalized", "single_word", "lstrip", "rstrip"])
def test_tokenizers_whose_tokens_heed_what_stands_around_them_are_not_taken(flag):
    from tokenizers import AddedToken

    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens([AddedToken("<extra>", **{"normalized": False, flag: True})])
    assert words_of(type("Fast", (), {"backend_tokenizer": tokenizer})) is None
