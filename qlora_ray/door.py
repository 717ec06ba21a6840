"""The frame of every door: its arguments, its exit codes, and how an error is told.

Exit codes: 0 done, 1 failed, 2 impossible request (one message, a traceback only with --debug), 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable

from qlora_ray.config import Config, find_file, load_config
from qlora_ray.errors import ConfigError, ProcessDied


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for python -m qlora_ray.<name>, with the one option that all doors share."""
    parser = argparse.ArgumentParser(prog=f"python -m qlora_ray.{name}", description=description)
    parser.add_argument("--debug", action="store_true", help="verbose logs and tracebacks")
    return parser


def run(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
    interrupted: str = "Interrupted.",
) -> int:
    """Read the arguments, do `body`, and return its exit code, or that of what it raised.

    Options and overrides may come in any order. A Ray that `body` has started is shut down.
    """
    arguments = parser.parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Slurm, Kubernetes and clouds send first
    was_running = _ray_runs()
    try:
        return body(arguments)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except ConfigError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ProcessDied as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a run or sweep that has started ends with a summary
        from qlora_ray.storage import DISK_IS_FULL, FREE_SPACE

        if error.errno not in DISK_IS_FULL:
            raise
        print(f"error: {error}. {FREE_SPACE}", file=sys.stderr)
        return 1
    finally:
        if _ray_runs() and not was_running:
            shut_ray_down(arguments.debug)


def shut_ray_down(debug: bool) -> None:
    """End this process's Ray; what it says of processes that end with it goes nowhere."""
    from qlora_ray.console import chatter_goes_to

    with contextlib.nullcontext() if debug else chatter_goes_to(os.devnull):
        sys.modules["ray"].shutdown()


def add_config_arguments(parser: argparse.ArgumentParser, default: str = "configs/quickstart.yaml") -> None:
    """The arguments of a door that reads a config."""
    parser.add_argument("-c", "--config", metavar="FILE", default=default, help=f"YAML file (default: {default})")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. training.learning_rate=1e-4")
    parser.add_argument("--deepspeed", metavar="FILE.json", help='DeepSpeed config; "auto" values are filled in')


def read_arguments(arguments: argparse.Namespace) -> tuple[Config, str]:
    """The config that the arguments ask for, and the name of its file without ending. Raises ConfigError."""
    path = find_file(arguments.config)
    overrides = list(arguments.overrides)
    if arguments.deepspeed:
        overrides.append(f"deepspeed.config_file={json.dumps(arguments.deepspeed)}")
    return load_config(path, overrides), path.stem


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a door to a trained adapter."""
    parser.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder, or run directory: its best")
    parser.add_argument("--base", metavar="DIR", help="where its base lies now; default: as the adapter says")


def _ray_runs() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()
