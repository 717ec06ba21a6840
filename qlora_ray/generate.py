"""python -m qlora_ray.generate: ask a trained adapter; one prompt, a chat, or a file of prompts over many workers."""

import argparse
import contextlib
import difflib
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import yaml

from qlora_ray.config import ConfigError

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
# (least, most) of options that transformers itself checks only in the middle of answering, or not at all
LIMITS = {"max_new_tokens": (1, None), "num_beams": (1, None), "temperature": (1e-6, None), "top_p": (1e-6, 1),
          "top_k": (0, None), "min_p": (0, 1), "typical_p": (1e-6, 1), "repetition_penalty": (1e-6, None)}  # fmt: skip
WHOLE = ("max_new_tokens", "num_beams", "top_k")
OURS = ("pad_token_id", "eos_token_id", "return_dict_in_generate", "num_return_sequences", "use_cache")


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code: 0 done, 2 impossible request, 130 interrupted."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        _check(arguments)
        return _generate(arguments)
    except ConfigError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every door to a trained adapter shares."""
    parser.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder, or run directory: its best")
    parser.add_argument("--base", metavar="DIR", help="where its base lies now; default: as the adapter says")
    parser.add_argument("--debug", action="store_true", help="logs and tracebacks")


def quiet(debug: bool) -> None:
    """Keep what libraries say while loading out of the answers."""
    # bitsandbytes wraps helpers in torch.compile, which imports a compiler for a second; nothing here is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Threads that spin while they wait make a busy machine's small products five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if debug:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    else:
        import logging

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces optional kernels
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore",
                 "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        for name, value in quiet.items():
            os.environ.setdefault(name, value)
        import warnings

        warnings.simplefilter("ignore")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Importing makes millions of objects and no garbage: looking for it takes a fifth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_ray.generate", description="Answer with a trained adapter on its 4-bit base."
    )
    add_adapter_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="answer this")
    what.add_argument("--chat", action="store_true", help="talk: several turns, streamed; /reset, /quit")
    what.add_argument("--input", metavar="FILE.jsonl", help="answer each line: {prompt}, {messages} or {instruction}")
    parser.add_argument("--output", metavar="FILE.jsonl", help="with --input: where answers go, in the input's order")
    parser.add_argument("--system", metavar="TEXT", help="system message before the first turn")
    parser.add_argument("--compare", action="store_true", help="the base's answer beside the adapter's")
    parser.add_argument("--seed", type=int, default=0, help="for sampling (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="with --input: prompts at once (default: 16)")
    parser.add_argument("--workers", type=int, help="with --input: Ray workers (default: one a GPU, or one)")
    parser.add_argument("--address", help='with --input: a running Ray cluster, e.g. "auto"; default: a private one')
    parser.add_argument(
        "options", nargs="*", metavar="option=value", help="of GenerationConfig: max_new_tokens=64 temperature=0.7"
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.input) != bool(arguments.output):
        raise ConfigError("--input and --output go together: a file of prompts, and where its answers go.")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ConfigError("--prompt is empty.")
    for name in ("batch_size", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1.")


def _generate(arguments: argparse.Namespace) -> int:
    from qlora_ray.model.record import open_adapter

    quiet(arguments.debug)
    adapter = open_adapter(arguments.adapter, arguments.base)
    if arguments.input:
        from qlora_ray.use.batch import Job, answer_file

        options = read_options(arguments.options)
        job = Job(adapter, options, arguments.batch_size, arguments.compare, arguments.seed, arguments.system)
        return answer_file(job, arguments.input, arguments.output, arguments.workers, arguments.address)
    with no_garbage_collection():
        from qlora_ray.use import chat, load

        options = read_options(arguments.options)
        loaded = load.load(adapter, load.pick_device())
    if arguments.chat:
        return chat.talk(loaded, options, arguments.system, arguments.compare, arguments.seed)
    return chat.answer_once(loaded, options, arguments.prompt, arguments.system, arguments.compare, arguments.seed)


def read_options(texts: list[str]) -> dict[str, Any]:
    """GenerationConfig options from key=value. A sampling option switches do_sample on. Raises ConfigError."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text!r}: an option is written name=value, e.g. max_new_tokens=64.")
        options[name] = yaml.safe_load(value)
        if isinstance(options[name], str):  # YAML 1.1 reads 1e-1 as a text
            with contextlib.suppress(ValueError):
                options[name] = float(options[name])
    if options:
        _validate(options)
    if any(options.get(name) is not None for name in SAMPLING):
        options.setdefault("do_sample", True)
    return options


def _validate(options: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - set(OURS)
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean {close[0]}?" if close else " See transformers' GenerationConfig."
            raise ConfigError(f"{name}: no such generation option.{hint}")
    for name in LIMITS.keys() & options.keys():
        value, (least, most) = options[name], LIMITS[name]
        kind = int if name in WHOLE else (int, float)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or value < least or (most is not None and value > most):
            what = "a whole number" if name in WHOLE else "a number"
            limit = f"of at least {least:g}" if most is None else f"between {least:g} and {most:g}"
            raise ConfigError(f"{name}={value}: must be {what} {limit}.")
    try:
        GenerationConfig(**options).validate()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{', '.join(options)}: {str(error).splitlines()[0]}") from None


if __name__ == "__main__":
    sys.exit(main())
