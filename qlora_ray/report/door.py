"""python -m qlora_ray.report: the page of a run, or of several runs beside each other."""

import argparse
import sys
from pathlib import Path

from qlora_ray.report.compare import write_comparison
from qlora_ray.report.page import write_report


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code: 0 done, 2 not a run directory."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_ray.report", description="Write report.html of a run, or compare several runs."
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="a directory that holds metrics.jsonl; several: compared",
    )
    parser.add_argument("--output", type=Path, help="of a comparison (default: comparison.html beside the first run)")
    arguments = parser.parse_args(argv)
    for run_dir in arguments.run_dir:
        if not (run_dir / "metrics.jsonl").is_file():
            reason = "has no metrics.jsonl" if run_dir.is_dir() else "is not a directory"
            print(f"error: RUN_DIR={run_dir}: {reason}. Give <ray.storage_path>/<ray.run_name>.", file=sys.stderr)
            return 2
    if arguments.output and not arguments.output.parent.is_dir():
        print(f"error: --output {arguments.output}: no folder {arguments.output.parent}.", file=sys.stderr)
        return 2
    try:
        if len(arguments.run_dir) == 1 and arguments.output is None:
            print(write_report(arguments.run_dir[0]))
        else:
            output = arguments.output or arguments.run_dir[0].resolve().parent / "comparison.html"
            print(write_comparison(arguments.run_dir, output))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
