"""Turns messages into token ids and labels: what the model reads, and what it is trained to say."""

from dataclasses import dataclass
from pathlib import Path

from qlora_ray.config import ConfigError
from qlora_ray.data.formats import BadRecord, Messages

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default ignore_index

# For models without a chat template. The answer is closed by the tokenizer's own end-of-sequence token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}\n"
    "{% else %}### {{ message.role | capitalize }}:\n{{ message.content }}\n\n"
    "{% if message.role == 'user' %}### Assistant:\n{% endif %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Row:
    """One tokenized record."""

    input_ids: list[int]
    labels: list[int]  # input_ids where trained on, IGNORE_INDEX elsewhere; not shifted
    truncated: bool


def load_tokenizer(base_model: str, revision: str | None, trust_remote_code: bool = False):
    """The base's own fast tokenizer, with a pad token and a chat template.

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
        tokenizer.pad_token = tokenizer.eos_token  # masked by attention_mask and labels, so any id will do
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def render(tokenizer, messages: Messages, *, for_generation: bool = False) -> str:
    """The template's text; with for_generation it ends where the assistant begins to speak."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_generation)
    except TemplateError as error:
        raise BadRecord(f"the chat template refuses it: {error}") from error


def prompt_ids(tokenizer, messages: Messages) -> list[int]:
    """Token ids of a conversation up to where the assistant begins to speak."""
    return tokenizer(render(tokenizer, messages, for_generation=True), add_special_tokens=False)["input_ids"]


def tokenize(tokenizer, messages: Messages, max_length: int) -> Row:
    """Token ids of a conversation, labels on every assistant turn and the token that closes it.

    A turn's span in the rendered text runs from the end of its generation prompt to the end of the text up to and
    including it, so any template works whose rendering of a prefix is a prefix of the whole. Too long rows lose
    their end. Raises BadRecord when no label token would be left.
    """
    text = render(tokenizer, messages)
    spans = [
        _assistant_span(tokenizer, messages, i, text) for i, turn in enumerate(messages) if turn["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    labels = [
        token if any(start < end_of_token and start_of_token < end for start, end in spans) else IGNORE_INDEX
        for token, (start_of_token, end_of_token) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    kept = labels[:max_length]
    if all(label == IGNORE_INDEX for label in kept[1:]):  # the first token is never predicted
        raise BadRecord(f"the prompt alone is longer than training.max_length={max_length} tokens")
    return Row(ids[:max_length], kept, truncated=len(ids) > max_length)


def _assistant_span(tokenizer, messages: Messages, index: int, text: str) -> tuple[int, int]:
    before = render(tokenizer, messages[:index], for_generation=True)
    through = render(tokenizer, messages[: index + 1]).rstrip("\n")
    if not text.startswith(through) or not through.startswith(before):
        before = _common_start(before, through)  # templates that add, say, a think block to the generation prompt
        if not text.startswith(through):
            raise BadRecord("the chat template renders earlier turns differently once later ones follow")
    return len(before), len(through)


def _common_start(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def tokenizer_files(base_model_path: str) -> list[Path]:
    """The local files that decide how text becomes tokens, for the data fingerprint."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
             "merges.txt", "tokenizer.model")  # fmt: skip
    return [Path(base_model_path) / name for name in names if (Path(base_model_path) / name).is_file()]
