"""python -m qlora_ray.train: from a YAML file to an adapter."""

import argparse
import sys
import time

from qlora_ray import door
from qlora_ray.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code."""
    began = time.perf_counter()
    parser = door.make_parser("train", "Fine-tune a 4-bit LoRA on Ray.")
    door.add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the same run")
    return door.run(parser, lambda arguments: _train(arguments, began), argv, "Interrupted before the first step.")


def _train(arguments: argparse.Namespace, began: float) -> int:
    config, name = door.read_arguments(arguments)
    if config.sweep is not None:
        raise ConfigError(
            f"sweep: -c {arguments.config} describes a sweep of many runs. Start it with python -m qlora_ray.tune, "
            "or train its base config alone with sweep=null."
        )
    from qlora_ray.driver.start import Start

    return Start(config, name, arguments.resume, arguments.debug, began).train()


if __name__ == "__main__":
    sys.exit(main())
