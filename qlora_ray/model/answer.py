"""Answers of a causal language model to tokenized prompts, and how right they are."""

# B prompts in a batch, T tokens in the longest
import collections
import functools
import json
from typing import Any

import torch
from jinja2 import TemplateError

PROMPTS_PER_BATCH = 32
MARK = "Zq0qZ"
ANSWER = {"role": "assistant", "content": MARK}
CALLS = [
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "id": "000000000", "function": {"name": "x", "arguments": arguments}}
    ]}
    for arguments in (json.dumps({"x": MARK}), {"x": MARK})
]  # fmt: skip


def answer_texts(model: Any, prompts: list[list[int]], tokenizer: Any, device: torch.device, **options) -> list[str]:
    """Generate once for a batch of prompts of token ids; `options` as in transformers' GenerationConfig."""
    inputs = left_padded(prompts, tokenizer.pad_token_id, device)
    with torch.no_grad():
        output = model.generate(**inputs, **generation_options(model, tokenizer, options))
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    stop = stop_text(tokenizer)
    return [text.partition(stop)[0] for text in texts] if stop else texts


def generation_options(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options` over what answering a chat always needs. Greedy unless do_sample is set."""
    common = {"do_sample": False, "use_cache": True, "pad_token_id": tokenizer.pad_token_id}
    if not options.get("do_sample"):  # a base's own sampling defaults mean nothing to greedy search
        common |= {"temperature": None, "top_p": None, "top_k": None}
    stop = stop_text(tokenizer)
    common |= {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    return {**common, "eos_token_id": stop_token_ids(model, tokenizer), **options}


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the base's, and the one that closes a turn in the chat template."""
    own = getattr(model.generation_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing = tokenizer(_closing(tokenizer, ANSWER), add_special_tokens=False)["input_ids"]
    stops |= {closing[0]} & tokenizer.added_tokens_decoder.keys() if closing else set()
    # What ends a call may be another token; of several that follow it the last ends the turn.
    of_call = [
        number
        for call in CALLS
        for number in tokenizer(_closing(tokenizer, call), add_special_tokens=False)["input_ids"]
        if number in special
    ]
    return sorted(stops - {None} | set(of_call[-1:]))


def stop_text(tokenizer: Any) -> str:
    """The text that closes a turn in the chat template, where no token of its own does; else ""."""
    closing = _closing(tokenizer, ANSWER)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    places = [closing.index(token) for token in (*special, tokenizer.eos_token) if token in closing]
    return closing[: min(places, default=len(closing))].strip()


@functools.lru_cache(maxsize=16)
def _closing_of(tokenizer: Any, chat_template: str, answer: str) -> str:
    said = [{"role": "user", "content": "x"}, json.loads(answer)]
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False)
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ):  # calls, in a form that it does not take
        return ""
    return text[text.rindex(MARK) + len(MARK) :] if MARK in text else ""


def _closing(tokenizer: Any, answer: dict[str, Any]) -> str:
    """What the chat template puts after an answer."""
    return _closing_of(tokenizer, tokenizer.chat_template, json.dumps(answer))


def left_padded(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Pad prompts on the left for generation: input_ids and attention_mask, each (B, T) int64."""
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def is_exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, spaces at its ends aside."""
    return answer.strip() == expected.strip()


def exact_match(answers: list[str], expected: list[str]) -> float:
    """Share of the answers that are exact."""
    return sum(map(is_exact, answers, expected)) / len(expected)


def token_f1(answers: list[str], expected: list[str]) -> float:
    """Mean F1 over words, as in SQuAD (arXiv:1606.05250) but with case and punctuation kept."""
    return sum(map(_f1, answers, expected)) / len(expected)


def _f1(answer: str, expected: str) -> float:
    said, wanted = answer.split(), expected.split()
    if not said or not wanted:
        return float(said == wanted)
    common = (collections.Counter(said) & collections.Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))
