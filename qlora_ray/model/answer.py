"""Answers of a causal language model to tokenized prompts, and how right they are."""

# B prompts in a batch, T tokens in the longest
import collections
from typing import Any

import torch

PROMPTS_PER_BATCH = 32


def answer_texts(model: Any, prompts: list[list[int]], tokenizer: Any, device: torch.device, **options) -> list[str]:
    """Generate once for a batch of prompts of token ids; `options` as in transformers' GenerationConfig."""
    inputs = left_padded(prompts, tokenizer.pad_token_id, device)
    with torch.no_grad():
        output = model.generate(**inputs, **generation_options(model, tokenizer, options))
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def generation_options(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options` over what answering a chat always needs. Greedy unless do_sample is set."""
    common = {"do_sample": False, "use_cache": True, "pad_token_id": tokenizer.pad_token_id}
    if not options.get("do_sample"):  # a base's own sampling defaults mean nothing to greedy search
        common |= {"temperature": None, "top_p": None, "top_k": None}
    return {**common, "eos_token_id": stop_token_ids(model, tokenizer), **options}


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the base's, and the one that closes a turn in the chat template."""
    own = getattr(model.generation_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    text = tokenizer.apply_chat_template(said, tokenize=False)
    closing = tokenizer(text[text.rindex("x") + 1 :], add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(stops - {None} | ({closing[0]} & special if closing else set()))


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
