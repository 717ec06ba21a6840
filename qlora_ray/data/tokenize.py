"""Turns messages into token ids and the spans that are trained on: what the model reads, and what it learns to say."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_ray.config import ConfigError
from qlora_ray.data.formats import RAW_ROLES, BadRecord, Messages
from qlora_ray.data.template import PLAIN_TEMPLATE, ChatTemplate, Rendered, render

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index


@dataclass(frozen=True)
class Sample:
    """A tokenized record, or a window of a long text."""

    input_ids: list[int]
    spans: list[tuple[int, int]]  # [start, end) in tokens, of what is trained on; never token 0, which nothing predicts
    truncated: bool

    @property
    def labels(self) -> list[int]:
        """input_ids where trained on, IGNORE_INDEX elsewhere; not shifted."""
        labels = [IGNORE_INDEX] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def num_labels(self) -> int:
        """Tokens that are trained on."""
        return sum(end - start for start, end in self.spans)


def load_tokenizer(
    base_model: str, revision: str | None, trust_remote_code: bool = False, chat_template: str | None = None
):
    """The base's own fast tokenizer, with a pad token and a chat template (`chat_template` replaces its own).

    Raises ConfigError when there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.base_model={base_model}: no usable tokenizer: {str(error).splitlines()[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"model.base_model={base_model}: only a slow tokenizer; tokenizer.json is needed.")
    if tokenizer.eos_token is None:
        raise ConfigError(f"model.base_model={base_model}: the tokenizer has no end-of-sequence token (eos_token).")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # never attended to nor trained on, so any id will do
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default", PLAIN_TEMPLATE)
    return tokenizer


def prompt_ids(tokenizer, messages: Messages) -> list[int]:
    """Token ids of a conversation (or of a raw prompt) up to where the assistant begins to speak."""
    if messages and messages[0]["role"] in RAW_ROLES:
        return _first_ids(tokenizer) + tokenizer(messages[0]["content"], add_special_tokens=False)["input_ids"]
    return tokenizer(render(tokenizer, messages, for_generation=True), add_special_tokens=False)["input_ids"]


def prompt_of(tokenizer, messages: Messages) -> dict[str, Any] | None:
    """The question, its token ids, and the expected answer: the last assistant turn. None for a plain text."""
    if len(messages) < 2:
        return None
    ids = prompt_ids(tokenizer, messages[:-1])
    return {"prompt": messages[-2]["content"], "expected": messages[-1]["content"], "input_ids": ids}


class Encoder:
    """Encodes messages in batches: rendered by the template, tokenized by the Rust tokenizer, masked by offsets."""

    def __init__(self, tokenizer, max_length: int, train_on: str = "all_assistant_turns"):
        self.tokenizer, self._max_length, self._train_on = tokenizer, max_length, train_on
        self._template = ChatTemplate(tokenizer, train_on)
        self._first_ids = _first_ids(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, conversations: Sequence[Messages]) -> list[list[Sample] | BadRecord]:
        """Samples of each conversation (several only of a long raw text), or why it cannot be trained on.

        Too long conversations lose their end; one that would have no trained token left is refused.
        """
        is_raw = [conversation[0]["role"] in RAW_ROLES for conversation in conversations]
        chats = iter(self._template.render_all([c for c, raw in zip(conversations, is_raw, strict=True) if not raw]))
        rendered = [
            self._raw(conversation) if raw else next(chats)
            for conversation, raw in zip(conversations, is_raw, strict=True)
        ]
        encodings = iter(
            self._backend.encode_batch(
                [one.text for one in rendered if isinstance(one, Rendered)], add_special_tokens=False
            )
        )
        return [
            one if isinstance(one, BadRecord) else self._sample(one, next(encodings), conversation[0]["role"])
            for one, conversation in zip(rendered, conversations, strict=True)
        ]

    def _raw(self, conversation: Messages) -> Rendered:
        text = "".join(turn["content"] for turn in conversation)
        everything = len(conversation) == 1 or self._train_on == "everything"
        return Rendered(text, ((0 if everything else len(conversation[0]["content"]), len(text)),), is_closed=False)

    def _sample(self, rendered: Rendered, encoding, first_role: str) -> list[Sample] | BadRecord:
        ids = encoding.ids
        spans = [_token_span(encoding, len(ids), start, end) for start, end in rendered.spans]
        if first_role in RAW_ROLES and self._first_ids:
            shift = len(self._first_ids)
            ids, spans = self._first_ids + ids, [(start + shift, end + shift) for start, end in spans]
        if not rendered.is_closed:
            ids = [*ids, self.tokenizer.eos_token_id]
            spans.append((len(ids) - 1, len(ids)))
        if first_role == "text":
            return self._windows(ids)
        kept = min(len(ids), self._max_length)
        spans = [(max(1, start), min(end, kept)) for start, end in spans]
        spans = [(start, end) for start, end in spans if start < end]
        if not spans:
            return BadRecord(f"the prompt alone is longer than training.max_length={self._max_length} tokens")
        return [Sample(ids[:kept], spans, truncated=len(ids) > kept)]

    def _windows(self, ids: list[int]) -> list[Sample]:
        starts = list(range(0, len(ids), self._max_length))
        if len(starts) > 1 and len(ids) - starts[-1] == 1:
            starts[-1] -= 1  # one token alone has nothing to predict
        cuts = zip(starts, [*starts[1:], len(ids)], strict=True)
        return [Sample(ids[start:end], [(1, end - start)], truncated=False) for start, end in cuts]


def _token_span(encoding, count: int, start: int, end: int) -> tuple[int, int]:
    """[first, last) tokens that overlap characters [start, end). Offsets only grow, so both ends can be bisected."""
    tokens = range(count)
    first = bisect_right(tokens, start, key=lambda i: encoding.token_to_chars(i)[1])
    return first, bisect_left(tokens, end, lo=first, key=lambda i: encoding.token_to_chars(i)[0])


def _first_ids(tokenizer) -> list[int]:
    """What the tokenizer puts before a raw text: its beginning-of-sequence token, or nothing."""
    wrapped = tokenizer("")["input_ids"]
    return wrapped[:1] if wrapped and wrapped[0] == tokenizer.bos_token_id else []


def tokenizer_files(base: str, revision: str | None) -> list[Path]:
    """The files on this machine that decide how text becomes tokens, for the data fingerprint."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
             "merges.txt", "tokenizer.model")  # fmt: skip
    if Path(base).is_dir():
        return [Path(base) / name for name in names if (Path(base) / name).is_file()]
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(base, name, revision=revision) for name in names]
    return [Path(file) for file in cached if isinstance(file, str)]
