"""Answers one prompt or holds a conversation in the terminal, word by word as they come."""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from qlora_ray.data.turns import Messages
from qlora_ray.errors import BadRecord, ConfigError
from qlora_ray.inference.load import Loaded, fit_prompt, room
from qlora_ray.model.answer import generation_options, left_padded, stop_text

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


@dataclass(frozen=True)
class Speaker:
    """Who answers, and how."""

    loaded: Loaded
    options: dict[str, Any]  # of generation: inference/options.py
    compare: bool  # the base answers first
    seed: int


def answer_once(speaker: Speaker, asked: Messages) -> int:
    """Print the answer to one prompt. Raises ConfigError for a prompt that cannot be answered."""
    _say(speaker, asked)
    return 0


def talk(speaker: Speaker, opening: Messages) -> int:
    """Read turns from stdin and answer each, until /quit or the end of the input."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - gives input() its history and keys

        print(HELP)
    messages = opening
    while True:
        try:
            said = input("> " if is_terminal else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if said in ("/quit", "/exit"):
            return 0
        if said == "/reset":
            messages = opening
            print("(forgotten)")
        elif said.startswith("/"):
            print(HELP)
        elif said:
            messages = _turn(speaker, messages, said)


def _turn(speaker: Speaker, messages: Messages, said: str) -> Messages:
    asked = [*messages, {"role": "user", "content": said}]
    try:
        answer = _say(speaker, asked)
    except ConfigError as error:  # this turn does not fit; the conversation so far stays
        print(f"error: {error} /reset begins anew.", file=sys.stderr)
        return messages
    except KeyboardInterrupt:
        print(" (stopped)")
        return messages
    return [*asked, {"role": "assistant", "content": answer}]


def _say(speaker: Speaker, messages: Messages) -> str:
    """Stream the answer to stdout, after the base's with `compare`; returns the adapter's."""
    loaded = speaker.loaded
    try:
        ids = fit_prompt(loaded, messages, speaker.options)
    except BadRecord as error:
        raise ConfigError(f"the prompt cannot be put to this model: {error}") from error
    options = room(loaded, ids, speaker.options)
    if speaker.compare:
        print("base:")
        with loaded.model.disable_adapter():
            _stream(loaded, ids, options, speaker.seed)
        print("adapter:")
    return _stream(loaded, ids, options, speaker.seed)


def _stream(loaded: Loaded, ids: list[int], options, seed: int) -> str:
    from transformers import TextStreamer

    torch.manual_seed(seed)
    inputs = left_padded([ids], loaded.tokenizer.pad_token_id, loaded.device)
    stop = stop_text(loaded.tokenizer)
    can_stream = options.get("num_beams", 1) == 1 and not stop
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True) if can_stream else None
    with torch.no_grad():
        output = loaded.model.generate(
            **inputs, streamer=streamer, **generation_options(loaded.model, loaded.tokenizer, options)
        )
    text = loaded.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    text = text.partition(stop)[0] if stop else text
    if not can_stream:
        print(text)
    return text
