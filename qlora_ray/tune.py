"""python -m qlora_ray.tune: many train runs as one sweep, the best adapter promoted."""

import argparse
import sys
import time

from qlora_ray import door


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code."""
    began = time.monotonic()
    parser = door.make_parser("tune", "Search hyperparameters over distributed train runs.")
    door.add_config_arguments(parser, default="configs/sweep.yaml")
    parser.add_argument("--resume", action="store_true", help="go on with the newest sweep of the same name")
    parser.add_argument("--plan", action="store_true", help="print trials, resources and cost; start nothing")
    return door.run(parser, lambda arguments: _tune(arguments, began), argv, "Interrupted before the first trial.")


def _tune(arguments: argparse.Namespace, began: float) -> int:
    from qlora_ray.sweep import cost, run

    config, name = door.read_arguments(arguments)
    if arguments.plan:
        cost.show(config)
        return 0
    return run.sweep(config, name, arguments.resume, arguments.debug, began)


if __name__ == "__main__":
    sys.exit(main())
