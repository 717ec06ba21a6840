"""python -m qlora_ray.generate: ask a trained adapter; one prompt, a chat, or a file of prompts over many workers."""

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator

from qlora_ray import door
from qlora_ray.console import quiet
from qlora_ray.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code."""
    return door.run(_parser(), _generate, argv)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Importing makes millions of objects and no garbage: looking for it takes a fifth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _parser() -> argparse.ArgumentParser:
    parser = door.make_parser("generate", "Answer with a trained adapter on its 4-bit base.")
    door.add_adapter_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="answer this")
    what.add_argument("--chat", action="store_true", help="talk: several turns, streamed; /reset, /quit")
    what.add_argument("--input", metavar="FILE.jsonl", help="answer each line: {prompt}, {messages} or {instruction}")
    parser.add_argument("--output", metavar="FILE.jsonl", help="with --input: where answers go, in the input's order")
    parser.add_argument("--system", metavar="TEXT", help="system message before the first turn")
    parser.add_argument(
        "--tools", metavar="FILE.json", help="what may be called: a JSON list, as in a record's `tools`"
    )
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
    _check(arguments)
    from qlora_ray.inference.options import read_opening, read_options
    from qlora_ray.model.record import open_adapter

    quiet(arguments.debug)
    opening = read_opening(arguments.tools, arguments.system)
    adapter = open_adapter(arguments.adapter, arguments.base)
    if arguments.input:
        from qlora_ray.inference.batch import Job, answer_file

        options = read_options(arguments.options)
        job = Job(adapter, options, arguments.batch_size, arguments.compare, arguments.seed, opening)
        return answer_file(job, arguments.input, arguments.output, arguments.workers, arguments.address)
    with no_garbage_collection():
        from qlora_ray.inference import chat, load

        options = read_options(arguments.options)
        loaded = load.load(adapter, load.pick_device())
    speaker = chat.Speaker(loaded, options, arguments.compare, arguments.seed)
    if arguments.chat:
        return chat.talk(speaker, opening)
    return chat.answer_once(speaker, [*opening, {"role": "user", "content": arguments.prompt}])


if __name__ == "__main__":
    sys.exit(main())
