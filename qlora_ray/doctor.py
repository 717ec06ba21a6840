"""python -m qlora_ray.doctor: every node that a run would use, in green and red, before a GPU hour is spent."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from qlora_ray import door
from qlora_ray.config import Config
from qlora_ray.console import chatter_goes_to, console

COLOURS = {"ok": "green", "bad": "red", "unknown": "yellow"}


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code: 0 all green, 2 something is red or the request is impossible."""
    parser = door.make_parser("doctor", "Look at every node that the run would use.")
    door.add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--seconds", type=float, default=60, help="deadline of each question (default: 60)")
    return door.run(parser, _examine, argv)


def _examine(arguments: argparse.Namespace) -> int:
    rows = examine(door.read_arguments(arguments)[0], arguments.seconds, arguments.debug)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        show(rows)
    return 2 if any(row.state == "bad" for row in rows) else 0


def examine(config: Config, seconds: float, debug: bool) -> list[Any]:
    """The rows of all checks; starts a private Ray where the config names no cluster. Raises ConfigError."""
    from qlora_ray import storage
    from qlora_ray.cluster import connect
    from qlora_ray.planning import offload
    from qlora_ray.planning.early import read_deepspeed_json

    config = offload.taken_from_json(config, read_deepspeed_json(config))
    connect.set_environment(config, debug)
    folder = storage.open_folder(config.ray.storage_path)
    with contextlib.nullcontext() if debug else chatter_goes_to(os.devnull):
        hardware = connect.start_ray(config, debug)
        from qlora_ray.cluster import all_reduce, bandwidth
        from qlora_ray.cluster.ask import ask
        from qlora_ray.cluster.checks import CHECKS
        from qlora_ray.cluster.found import look
        from qlora_ray.cluster.needs import needs_of
        from qlora_ray.planning.early import facts_at_hand

        needs = needs_of(config, hardware, facts_at_hand(config))
        found = ask(config, folder, needs, seconds, quick=False)
        interfaces = {name: facts["interface"]["name"] for name, facts in found.nodes.items() if facts["interface"]}
        reduced = all_reduce.measure(needs.use_gpu, interfaces, seconds)
        place = config.deepspeed.nvme_path or (_nearest(folder.path) if folder.is_local else None)
        measured = bandwidth.measure(place, needs.use_gpu, seconds)
        return look(dataclasses.replace(found, all_reduce=reduced, bandwidth=measured), CHECKS)


def _nearest(path: str) -> str:
    """A folder, or the one that it will be made in."""
    return next(str(one) for one in (Path(path), *Path(path).absolute().parents) if one.is_dir())


def show(rows: list[Any]) -> None:
    """The table, and one line that says how it stands."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "node", "", "found", "what to do", box=None, pad_edge=False)
    for row in rows:
        colour = COLOURS[row.state]
        table.add_row(row.check, row.node, f"[{colour}]{row.state}[/]", escape(row.found), escape(row.todo))
    console.print(table)
    num_bad = sum(row.state == "bad" for row in rows)
    console.print(f"\n[red]{num_bad} red[/]: the run would fail there." if num_bad else "\n[green]ready[/]")


if __name__ == "__main__":
    sys.exit(main())
