"""Turns messages into token ids and the spans that are trained on: what the model reads, and what it learns to say."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_ray.data.borders import Borders, Tokens
from qlora_ray.data.formats import RAW_ROLES
from qlora_ray.data.mask import ChatTemplate, Rendered
from qlora_ray.data.pairs import halves, label_of
from qlora_ray.data.template import fit_template
from qlora_ray.data.turns import Messages
from qlora_ray.data.words import words_of
from qlora_ray.errors import BadRecord, ConfigError

ROUND_TRIP = "Every quick fox jumps over 12 lazy dogs\n  and runs away"
IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index


@dataclass(frozen=True)
class Sample:
    """A tokenized record, or a window of a long text."""

    ids: Sequence[int]
    spans: list[tuple[int, int]]  # [start, end) in tokens, of what is trained on; never token 0, which nothing predicts
    truncated: bool
    missing: tuple[str, ...] = ()  # kinds of what the record has and the text has not (see missing.py)
    num_shared: int = 0  # first tokens of a rejected answer's sample that may be read in the chosen one's
    is_desirable: bool = True

    @property
    def input_ids(self) -> list[int]:
        """The tokens as a list."""
        return list(self.ids)

    @property
    def labels(self) -> list[int]:
        """input_ids where trained on, IGNORE_INDEX elsewhere; not shifted."""
        labels = [IGNORE_INDEX] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels

    @property
    def num_labels(self) -> int:
        """Tokens that are trained on."""
        return sum(end - start for start, end in self.spans)


def load_tokenizer(
    base_model: str, revision: str | None, trust_remote_code: bool = False, chat_template: str | None = None,
    date: str | None = None,
):  # fmt: skip
    """The base's own fast tokenizer, with a pad token and a chat template (`chat_template` replaces its own).

    A template that prints the day prints `date` (YYYY-MM-DD). Raises ConfigError when there is no tokenizer.
    """
    return with_template(open_tokenizer(base_model, revision, trust_remote_code), chat_template, date)


def with_template(tokenizer, chat_template: str | None, date: str | None = None):
    """The tokenizer with a template that is fitted to it, as `load_tokenizer` returns it."""
    tokenizer.chat_template = fit_template(chat_template, tokenizer, bool(first_ids(tokenizer)), date)
    return tokenizer


def pieces_of(new_tokens: Sequence[str], base_model: str, trust_remote_code: bool) -> dict[int, list[int]]:
    """The id that each new token gets, and the tokens that its text is without it. Raises ConfigError."""
    tokenizer = open_tokenizer(base_model, None, trust_remote_code)
    before = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in new_tokens]
    add_tokens(tokenizer, new_tokens)
    return dict(zip(tokenizer.convert_tokens_to_ids(list(new_tokens)), before, strict=True))


def add_tokens(tokenizer, new_tokens: Sequence[str]) -> None:
    """Have the tokenizer know these as tokens of their own, in texts and in answers."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])


def open_tokenizer(
    base_model: str, revision: str | None, trust_remote_code: bool = False, new_tokens: Sequence[str] = ()
):
    """The base's own fast tokenizer with a pad token, and with new tokens. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        # tokenizers raises a plain Exception for a tokenizer.json that it cannot read.
        expected = OSError | ValueError | ImportError | KeyError | TypeError
        if type(error) is not Exception and not isinstance(error, expected):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"model.base_model={base_model}: no usable tokenizer: {reason}. Download or copy it again, or install the "
            "version of transformers that wrote it."
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"model.base_model={base_model}: only a slow tokenizer; tokenizer.json is needed.")
    if tokenizer.eos_token is None:
        raise ConfigError(f"model.base_model={base_model}: the tokenizer has no end-of-sequence token (eos_token).")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # never attended to nor trained on, so any id will do
    add_tokens(tokenizer, new_tokens)
    return tokenizer


def refuse_lossy(tokenizer, base_model: str) -> None:
    """Raise ConfigError for a tokenizer that runs words together or drops letters: no training can bring them back."""
    back = _back(tokenizer)
    if _words(back) == _words(ROUND_TRIP):
        return
    together = "".join(_words(back)) == "".join(_words(ROUND_TRIP))
    raise ConfigError(
        f"model.base_model={base_model}: its tokenizer does not give a text back: of {ROUND_TRIP!r} it makes {back!r}, "
        f"which {'loses the spaces between words' if together else 'is another text'}. Often its files belong to "
        "another tokenizer class (tokenizer_class in tokenizer_config.json), or tokenizer.json was made for another "
        "library. Download tokenizer files that belong to this base, or save them anew with save_pretrained."
    )


def _back(tokenizer) -> str:
    """What becomes of ROUND_TRIP. A space before it is no fault."""
    ids = tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(" ")


def _words(text: str) -> list[str]:
    return text.casefold().split()


def prompt_ids(tokenizer, messages: Messages) -> list[int]:
    """Token ids of a conversation (or of a raw prompt) up to where the assistant begins to speak. Raises BadRecord."""
    if messages and messages[0]["role"] in RAW_ROLES:
        return first_ids(tokenizer) + tokenizer(messages[0]["content"], add_special_tokens=False)["input_ids"]
    rendered = _template_of(tokenizer, tokenizer.chat_template).prompt(messages)
    return list(_borders_of(tokenizer, len(tokenizer)).encode([rendered])[0].ids)


def prompt_of(tokenizer, messages: Messages) -> dict[str, Any] | None:
    """The question, its token ids, and the expected answer: the last assistant turn. None for a plain text."""
    messages = halves(messages)[0]
    if len(messages) < 2:
        return None
    ids = prompt_ids(tokenizer, messages[:-1])
    return {"prompt": messages[-2]["content"], "expected": _expected(tokenizer, messages), "input_ids": ids}


def _expected(tokenizer, messages: Messages) -> str:
    """What is answered, as generation shows it: a thought and calls as the template writes them, no special token."""
    if messages[0]["role"] in RAW_ROLES:
        return messages[-1]["content"]
    template = _template_of(tokenizer, tokenizer.chat_template)
    last = {key: value for key, value in messages[-1].items() if key != "weight"}
    (made,) = template.render_all([[*messages[:-1], last]])
    if isinstance(made, BadRecord):
        raise made
    said = made[-1].text[slice(*made[-1].spans[-1])].removesuffix(template.closing())
    return tokenizer.decode(tokenizer(said, add_special_tokens=False)["input_ids"], skip_special_tokens=True)


@lru_cache(maxsize=4)
def _template_of(tokenizer, chat_template: str) -> ChatTemplate:
    """What the tokenizer's template has shown of itself; `chat_template` is its text, for it may be replaced."""
    return ChatTemplate(tokenizer)


@lru_cache(maxsize=4)
def _borders_of(tokenizer, num_tokens: int) -> Borders:
    """Tokenizes prompts whole, as generate does; `num_tokens` is how many it knows, for there may come more."""
    return Borders(tokenizer)


class Encoder:
    """Encodes messages in batches: rendered by the template, tokenized by the Rust tokenizer, masked by offsets."""

    def __init__(
        self, tokenizer, max_length: int, train_on: str = "all_assistant_turns", keep_thoughts: str = "template"
    ):
        self.tokenizer, self._max_length, self._train_on = tokenizer, max_length, train_on
        self.template = ChatTemplate(tokenizer, train_on, keep_thoughts)
        self._first_ids = array("i", first_ids(tokenizer))
        self._borders = Borders(tokenizer, words_of(tokenizer))

    def notes(self) -> tuple[str, ...]:
        """What a user should know of how this template and this tokenizer go together."""
        template, bos = self.template, self.tokenizer.bos_token
        closing, opening = template.closing(), template.unused_opening
        notes = []
        if self._first_ids and not template.prompt([{"role": "user", "content": "x"}]).text.startswith(bos):
            notes.append(f"The tokenizer begins texts with {bos}, its chat template does not: no row begins with it.")
        if opening:
            notes.append(
                f"The chat template opens an answer with {opening!r}, and no row has it: generate and evaluate send "
                "prompts without it. So should whatever else serves the adapter."
            )
        if closing and not template.stops(closing):
            notes.append(
                f"The chat template closes an answer with {closing!r}, which is no token of its own: generate and "
                "evaluate look for the text."
            )
        if (back := _back(self.tokenizer)) != ROUND_TRIP:
            notes.append(f"The tokenizer gives {ROUND_TRIP!r} back as {back!r}: answers can be no other.")
        return tuple(notes)

    def encode(self, conversations: Sequence[Messages]) -> list[list[Sample] | BadRecord]:
        """Samples of each conversation, or why it cannot be trained on.

        Several only of a long raw text, of a chat where data.keep_thoughts asks for it, and of a pair: one of the
        preferred conversation, one of the other. Too long conversations lose their end; one that would have no trained
        token left is refused.
        """
        of_each = [halves(conversation) for conversation in conversations]
        made = iter(self._encode([half for both in of_each for half in both]))
        joined = [_pair(next(made), next(made)) if len(both) == 2 else next(made) for both in of_each]
        return [_labelled(one, label_of(whole)) for one, whole in zip(joined, conversations, strict=True)]

    def _encode(self, conversations: Sequence[Messages]) -> list[list[Sample] | BadRecord]:
        is_raw = [conversation[0]["role"] in RAW_ROLES for conversation in conversations]
        chats = iter(self.template.render_all([c for c, raw in zip(conversations, is_raw, strict=True) if not raw]))
        rendered = [
            [self._raw(conversation)] if raw else next(chats)
            for conversation, raw in zip(conversations, is_raw, strict=True)
        ]
        flat = [one for made in rendered if not isinstance(made, BadRecord) for one in made]
        tokens = iter(self._borders.encode(flat))
        return [
            made
            if isinstance(made, BadRecord)
            else self._samples(conversation[0]["role"], [(one, next(tokens)) for one in made])
            for made, conversation in zip(rendered, conversations, strict=True)
        ]

    def _raw(self, conversation: Messages) -> Rendered:
        text = "".join(turn["content"] for turn in conversation)
        everything = len(conversation) == 1 or self._train_on == "everything"
        return Rendered(text, ((0 if everything else len(conversation[0]["content"]), len(text)),), is_closed=False)

    def _samples(self, first_role: str, pairs: list[tuple[Rendered, Tokens]]) -> list[Sample] | BadRecord:
        made = [self._sample(first_role, one, tokens) for one, tokens in pairs]
        usable = [sample for samples in made if not isinstance(samples, BadRecord) for sample in samples]
        return usable or next(one for one in made if isinstance(one, BadRecord))

    def _sample(self, first_role: str, rendered: Rendered, tokens: Tokens) -> list[Sample] | BadRecord:
        ids, spans = tokens.ids, tokens.spans
        if first_role in RAW_ROLES and self._first_ids:
            shift = len(self._first_ids)
            ids, spans = self._first_ids + ids, [(start + shift, end + shift) for start, end in spans]
        if not rendered.is_closed:
            ids = ids + array("i", [self.tokenizer.eos_token_id])
            spans = [*spans, (len(ids) - 1, len(ids))]
        if first_role == "text":
            return self._windows(ids)
        kept = min(len(ids), self._max_length)
        spans = [(max(1, start), min(end, kept)) for start, end in spans]
        spans = [(start, end) for start, end in spans if start < end]
        if not spans:
            return BadRecord(f"the prompt alone is longer than training.max_length={self._max_length} tokens")
        return [Sample(ids[:kept], spans, len(ids) > kept, rendered.missing)]

    def _windows(self, ids: array) -> list[Sample]:
        starts = list(range(0, len(ids), self._max_length))
        if len(starts) > 1 and len(ids) - starts[-1] == 1:
            starts[-1] -= 1  # one token alone has nothing to predict
        cuts = zip(starts, [*starts[1:], len(ids)], strict=True)
        return [Sample(ids[start:end], [(1, end - start)], truncated=False) for start, end in cuts]


def _pair(chosen: list[Sample] | BadRecord, rejected: list[Sample] | BadRecord) -> list[Sample] | BadRecord:
    for made in (chosen, rejected):
        if isinstance(made, BadRecord):
            return made
    assert not isinstance(chosen, BadRecord) and not isinstance(rejected, BadRecord)
    assert len(chosen) == len(rejected) == 1, "a half of a pair has several samples"
    if chosen[0].ids == rejected[0].ids:
        return BadRecord("chosen and rejected are the same within training.max_length tokens")
    return [*chosen, replace(rejected[0], num_shared=_num_shared(chosen[0], rejected[0]))]


def _labelled(made: list[Sample] | BadRecord, is_desirable: bool | None) -> list[Sample] | BadRecord:
    """A labelled answer's sample, which knows where the answer begins."""
    if is_desirable is None or isinstance(made, BadRecord):
        return made
    return [replace(one, num_shared=one.spans[0][0], is_desirable=is_desirable) for one in made]


def _num_shared(chosen: Sample, rejected: Sample) -> int:
    """First tokens that both have and that are not trained on, but the last: each answer has its own to begin after."""
    most = min(chosen.spans[0][0], rejected.spans[0][0]) - 1
    pairs = zip(chosen.input_ids[:most], rejected.input_ids[:most], strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), most)


def first_ids(tokenizer) -> list[int]:
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
