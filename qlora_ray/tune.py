"""python -m qlora_ray.tune: many train runs as one sweep, the best adapter promoted."""

import argparse
import signal
import sys
import time
import traceback

from qlora_ray.config import ConfigError
from qlora_ray.train import add_config_arguments, read_arguments


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code: 0 done, 1 failed, 2 impossible request, 130 interrupted."""
    began = time.monotonic()
    arguments = _parser().parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from qlora_ray.sweep import cost, run

        config, name = read_arguments(arguments)
        if arguments.plan:
            cost.show(config)
            return 0
        return run.sweep(config, name, arguments.resume, arguments.debug, began)
    except KeyboardInterrupt:
        print("Interrupted before the first trial.", file=sys.stderr)
        return 130
    except ConfigError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        from qlora_ray.storage import DISK_IS_FULL, FREE_SPACE

        if error.errno not in DISK_IS_FULL:
            raise
        print(f"error: {error}. {FREE_SPACE}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_ray.tune", description="Search hyperparameters over distributed train runs."
    )
    add_config_arguments(parser, default="configs/sweep.yaml")
    parser.add_argument("--resume", action="store_true", help="go on with the newest sweep of the same name")
    parser.add_argument("--plan", action="store_true", help="print trials, resources and cost; start nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
