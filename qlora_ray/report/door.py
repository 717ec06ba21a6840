"""python -m qlora_ray.report: the page of a run, or of several runs beside each other; or all of them, live."""

import argparse
from pathlib import Path

from qlora_ray import door
from qlora_ray.errors import ConfigError
from qlora_ray.report.compare import write_comparison
from qlora_ray.report.page import write_report
from qlora_ray.rundir import names


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code: 2 for what is not a run directory, or a damaged one."""
    parser = door.make_parser("report", "Write report.html of a run, or compare several runs; or serve all, live.")
    parser.add_argument(
        "run_dir", type=Path, nargs="*", metavar="DIR",
        help="a directory that holds metrics.jsonl; several: compared; with --serve a ray.storage_path (default: runs)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="of a comparison (default: comparison.html beside the first run)")
    parser.add_argument("--serve", action="store_true", help="a page of all runs, current, for this machine alone")
    parser.add_argument("--port", type=int, default=8321, help="with --serve (default: 8321)")
    return door.run(parser, _serve_or_report, argv)


def _serve_or_report(arguments: argparse.Namespace) -> int:
    if not arguments.serve:
        return _report(arguments)
    if len(arguments.run_dir) > 1 or arguments.output:
        raise ConfigError("--serve: takes one ray.storage_path and no --output; tick runs on the page to compare them.")
    from qlora_ray.report.serve import serve

    serve((arguments.run_dir or [Path("runs")])[0], arguments.port, lambda line: print(line, flush=True))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    if not arguments.run_dir:
        raise ConfigError("DIR: name a run directory, or several; or --serve.")
    for run_dir in arguments.run_dir:
        if not (run_dir / names.METRICS).is_file():
            reason = f"has no {names.METRICS}" if run_dir.is_dir() else "is not a directory"
            raise ConfigError(f"DIR={run_dir}: {reason}. Give <ray.storage_path>/<ray.run_name>.")
    if arguments.output and not arguments.output.parent.is_dir():
        raise ConfigError(f"--output {arguments.output}: no folder {arguments.output.parent}.")
    if len(arguments.run_dir) == 1 and arguments.output is None:
        print(write_report(arguments.run_dir[0]))
    else:
        output = arguments.output or arguments.run_dir[0].resolve().parent / "comparison.html"
        print(write_comparison(arguments.run_dir, output))
    return 0
