"""python -m qlora_ray.init: a YAML file that runs, from your model, your data and what this machine has."""

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_ray import door
from qlora_ray.config import RUN_NAME, make_config
from qlora_ray.errors import ConfigError

if TYPE_CHECKING:
    from qlora_ray.model.facts import ModelFacts
    from qlora_ray.planning.suggest import Machine, Suggestion


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code."""
    parser = door.make_parser("init", "Write a YAML file that trains your model on your data.")
    parser.add_argument("--model", required=True, metavar="M", help="folder with safetensors and tokenizer, or hub id")
    parser.add_argument("--data", required=True, metavar="D", help="file, glob, folder, URI or hub data set id")
    parser.add_argument("-o", "--output", type=Path, default=Path("my.yaml"), metavar="FILE", help="default: my.yaml")
    parser.add_argument("--gpus", type=int, metavar="N", help="workers, one GPU each (default: this machine's)")
    parser.add_argument("--gib", type=float, metavar="M", help="memory of each (default: what is free on this machine)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return door.run(parser, _init, argv)


def _init(arguments: argparse.Namespace) -> int:
    from qlora_ray.cluster import here
    from qlora_ray.console import chatter_goes_to, quiet
    from qlora_ray.planning import yaml_file

    _check_output(arguments.output, arguments.force)
    machine = here.machine(arguments.gpus, arguments.gib)
    quiet(arguments.debug)
    with contextlib.nullcontext() if arguments.debug else chatter_goes_to(os.devnull):
        made, base = _suggest(arguments, machine)
    try:
        arguments.output.write_text(yaml_file.as_yaml(made, base, machine), encoding="utf-8")
    except PermissionError as error:
        raise ConfigError(f"-o {arguments.output}: {error.strerror}. Choose another folder.") from None
    told, commands = yaml_file.told(made, base, machine), _commands(arguments.output)
    if arguments.json:
        said = {"file": str(arguments.output), "settings": made.values, "why": told, "next": commands}
        print(json.dumps(said, ensure_ascii=False))
        return 0
    print(f"{arguments.output}: written. Change it as you like; python -m qlora_ray.data -c shows what it trains on.")
    for name, text in told.items():
        print(f"  {name:8}{text}")
    print("\n".join(["Next:", *(f"  {command}" for command in commands)]))
    return 0


def _suggest(arguments: argparse.Namespace, machine: "Machine") -> "tuple[Suggestion, ModelFacts]":
    from qlora_ray.console import say_note
    from qlora_ray.data.check import check_records
    from qlora_ray.data.lengths import measure
    from qlora_ray.model.hub import folder_at_hand
    from qlora_ray.planning.early import check_files, exact_facts
    from qlora_ray.planning.suggest import suggest

    asked = {"model": {"base_model": arguments.model}, "data": {"train_file": arguments.data}}
    config = make_config(asked)
    check_files(config)
    check_records(config)
    if folder_at_hand(arguments.model, None) is None and not arguments.json:
        say_note(f"{arguments.model} is not on this machine: it is downloaded from the model hub.")
    base = exact_facts(config)
    template, lengths = measure(config)
    if template:
        asked["data"]["chat_template"] = template
    return suggest(asked, base, lengths, machine), base


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise ConfigError(f"-o {output}: is there already. Choose another name, or write over it with --force.")
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise ConfigError(f"-o {output}: {what}. Name a file, e.g. my.yaml.")


def _commands(output: Path) -> list[str]:
    """What to type next, with a name that no run has yet."""
    stem = output.stem if re.fullmatch(RUN_NAME, output.stem) else "my"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if not Path("runs", name).exists())
    return [
        f"python -m qlora_ray.train -c {shlex.quote(str(output))} ray.run_name={name}",
        f"python -m qlora_ray.generate --adapter runs/{name} --chat",
    ]


if __name__ == "__main__":
    sys.exit(main())
