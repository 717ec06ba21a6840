"""python -m qlora_ray.plan: what fits on N GPUs of M GiB, and how fast, in seconds and without a GPU."""

import argparse
import sys

from qlora_ray import door
from qlora_ray.planning.memory import PRODUCT_FLOPS
from qlora_ray.planning.table import answer, host_gib_here


def main(argv: list[str] | None = None) -> int:
    """Print a table; returns the exit code."""
    parser = door.make_parser("plan", "What fits on N GPUs of M GiB, and how fast. Needs no GPU.")
    door.add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="workers, one GPU each (default: 1)")
    parser.add_argument("--gib", type=float, default=80, metavar="M", help="memory of each (default: 80)")
    parser.add_argument("--gpu", default="H100", help=f"for the speed: {', '.join(PRODUCT_FLOPS)}")
    parser.add_argument(
        "--host-gib", type=float, metavar="M",
        help="host memory of each, for what its layers park (default: this machine's or container's, shared)",
    )  # fmt: skip
    return door.run(parser, _plan, argv)


def _plan(arguments: argparse.Namespace) -> int:
    arguments.overrides.append(f"ray.num_workers={arguments.gpus}")
    config, _ = door.read_arguments(arguments)
    host_gib = host_gib_here() / arguments.gpus if arguments.host_gib is None else arguments.host_gib
    print(answer(config, arguments.gib, arguments.gpu, host_gib))
    return 0


if __name__ == "__main__":
    sys.exit(main())
