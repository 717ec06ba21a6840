"""python -m qlora_ray.evaluate: how good is it? Loss, pairs, exact match, F1 and lm-eval, base against adapter."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from qlora_ray import door
from qlora_ray.console import quiet
from qlora_ray.errors import ConfigError
from qlora_ray.inference.options import read_options


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code."""
    return door.run(_parser(), _evaluate, argv)


def _parser() -> argparse.ArgumentParser:
    parser = door.make_parser("evaluate", "Judge a trained adapter against its base.")
    door.add_adapter_arguments(parser)
    parser.add_argument("--file", metavar="FILE", help="records with answers; default: the run's held-out ones")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="answer so many of them; default: as the run did")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at once for the loss (default: 8)")
    parser.add_argument("--tasks", metavar="A,B", help="lm-evaluation-harness tasks, where lm-eval is installed")
    parser.add_argument("--include-path", metavar="DIR", help="with --tasks: a folder of task YAML files of your own")
    parser.add_argument("--limit", type=int, help="with --tasks: so many examples a task")
    parser.add_argument("--output", metavar="FILE.json", help="also write the results here, answers included")
    parser.add_argument("options", nargs="*", metavar="option=value", help="of GenerationConfig: max_new_tokens=64")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("num_prompts", 0), ("batch_size", 1), ("limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}.")
    if arguments.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('--tasks: lm-evaluation-harness is not installed. pip install "qlora_ray[lm-eval]".')
    if arguments.output and not Path(arguments.output).parent.is_dir():
        raise ConfigError(f"--output {arguments.output}: no folder {Path(arguments.output).parent}.")


def _evaluate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from qlora_ray.model.record import open_adapter

    quiet(arguments.debug)
    options = read_options(arguments.options)
    adapter = open_adapter(arguments.adapter, arguments.base)
    from qlora_ray.inference import judge
    from qlora_ray.inference.load import load, open_tokenizer, pick_device

    examples = judge.read_examples(adapter, open_tokenizer(adapter), arguments.file)
    num_prompts = judge.num_prompts_of_run(adapter) if arguments.num_prompts is None else arguments.num_prompts
    loaded = load(adapter, pick_device())
    results: dict[str, Any] = {"adapter": str(adapter.folder), "base_model": adapter.record["base"]["base_model"]}
    results |= judge.judge(loaded, examples, num_prompts, arguments.batch_size, judge.run_options(adapter) | options)
    if arguments.tasks:
        results["tasks"] = judge.lm_eval(loaded, arguments.tasks.split(","), arguments.limit, arguments.include_path)
    _show(results)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=1, ensure_ascii=False), "utf-8")
    return 0


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "base", "with the adapter")
    for name, value in results["base"].items():
        shown = "{:.1%}" if name in ("exact_match", "token_f1", "pairs_right") else "{:.4f}"
        table.add_row(name, *(shown.format(which) for which in (value, results["with_adapter"][name])))
    if rewards := results.get("rewards"):
        table.add_row("rewards/accuracies", "", f"{rewards['accuracies']:.1%}")
        table.add_row("rewards/margins (without beta)", "", f"{rewards['margins']:.4f}")
    for task, metrics in results.get("tasks", {}).items():
        for name, values in metrics.items():
            table.add_row(f"{task} {name}", f"{values['base']:.4f}", f"{values['with_adapter']:.4f}")
    Console(highlight=False).print(table)
    print(f"{results['num_rows']:,} rows, {results['num_label_tokens']:,} answer tokens; "
          f"{results['num_prompts']:,} prompts answered")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
