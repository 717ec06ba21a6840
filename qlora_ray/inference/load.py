"""An adapter on its base, quantized as in training, with its own tokenizer."""

from dataclasses import dataclass
from typing import Any

import torch

from qlora_ray.data.tokenize import load_tokenizer, prompt_ids
from qlora_ray.data.turns import Messages, split_tools
from qlora_ray.errors import BadRecord, ConfigError, TooLong
from qlora_ray.model.adapter import load_adapter
from qlora_ray.model.base import load_base
from qlora_ray.model.record import Adapter, tokenizer_sha256
from qlora_ray.model.routed import compute_in_4_bits
from qlora_ray.model.token_rows import make_room

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Loaded:
    """A PEFT model in evaluation mode and what goes with it."""

    model: Any
    tokenizer: Any
    device: torch.device
    context_length: int | None


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(adapter: Adapter, device: torch.device) -> Loaded:
    """Load base, adapter and tokenizer. Raises ConfigError where they do not fit each other."""
    tokenizer = open_tokenizer(adapter)
    has_packed_experts = bool(adapter.packed_stacks)
    base = load_base(adapter.model, adapter.quantization, adapter.compute_dtype, device, has_packed_experts)
    make_room(base, adapter.num_token_rows)
    try:
        model = load_adapter(base, str(adapter.folder))
        compute_in_4_bits(model)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"--adapter {adapter.folder}: does not fit its base: {reason}") from error
    model.eval()
    return Loaded(model, tokenizer, device, adapter.context_length)


def open_tokenizer(adapter: Adapter) -> Any:
    """The tokenizer that the adapter was trained with. Raises ConfigError where it is another one now."""
    _hush()
    tokenizer = load_tokenizer(str(adapter.folder), None, adapter.record["base"]["trust_remote_code"])
    found, wanted = tokenizer_sha256(tokenizer), adapter.record["tokenizer_sha256"]
    if found != wanted:
        raise ConfigError(
            f"--adapter {adapter.folder}: its tokenizer is not the one it was trained with (vocabulary and chat "
            f"template {found}, then {wanted}). Copy tokenizer files and chat_template.jinja of the run again."
        )
    return tokenizer


def _hush() -> None:
    """Keep transformers' warnings and progress bars out of the answers, unless more than the usual was asked for."""
    from transformers.utils import logging

    if logging.get_verbosity() >= logging.WARNING:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def fit_prompt(loaded: Loaded, messages: Messages, options: dict[str, Any]) -> list[int]:
    """Token ids of a conversation that is to be answered. Raises TooLong, and BadRecord where the template refuses."""
    ids = prompt_ids(loaded.tokenizer, messages)
    tools, _ = split_tools(messages)
    if tools and not all(tool["function"]["name"] in loaded.tokenizer.decode(ids) for tool in tools):
        raise BadRecord("the chat template leaves out the tools")
    new, context = options.get("max_new_tokens", 1), loaded.context_length
    if context is not None and len(ids) + new > context:
        raise TooLong(
            f"the prompt has {len(ids):,} tokens; with max_new_tokens={new} that is more than the model's context of "
            f"{context:,}. Shorten it, or ask for fewer new tokens."
        )
    return ids


def room(loaded: Loaded, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """The options with max_new_tokens filled in: what was asked, else 256 or what the context has left."""
    if "max_new_tokens" in options:
        return options
    left = DEFAULT_MAX_NEW_TOKENS if loaded.context_length is None else loaded.context_length - len(ids)
    return {**options, "max_new_tokens": min(DEFAULT_MAX_NEW_TOKENS, left)}
