"""python -m qlora_ray.data: what the model will see. Counts, lengths, packing, rejected records, and the mask.

With --check: what is worth knowing of the records before they are trained on.
"""

import argparse
import json
import sys
from typing import Any

from qlora_ray import door
from qlora_ray.config import Config
from qlora_ray.console import console, say_note


def main(argv: list[str] | None = None) -> int:
    """Prepare a config's data as a run would, and show it; returns the exit code."""
    parser = door.make_parser("data", "Show what the model will see.")
    door.add_config_arguments(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show with their mask (default: 3)")
    parser.add_argument("--check", action="store_true", help="look for copies, leaks, cut answers, ... (docs/data.md)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return door.run(parser, _show_data, argv)


def _show_data(arguments: argparse.Namespace) -> int:
    config, _ = door.read_arguments(arguments)
    if arguments.check:
        found = _check(config, arguments.debug)
        print(json.dumps(found, ensure_ascii=False)) if arguments.json else _show_check(found)
        return 0
    shown = _look(config, max(0, arguments.rows), arguments.debug)
    print(json.dumps(shown, ensure_ascii=False)) if arguments.json else _show(shown)
    return 0


def _look(config: Config, num_rows: int, debug: bool) -> dict[str, Any]:
    from qlora_ray import storage
    from qlora_ray.cluster import connect
    from qlora_ray.data.check import check_records
    from qlora_ray.data.describe import describe, show_rows
    from qlora_ray.data.prepare import make_recipe, prepare
    from qlora_ray.data.spread import run_on_cores, run_on_ray
    from qlora_ray.data.work import encoder_of
    from qlora_ray.model.facts import read_facts
    from qlora_ray.planning.early import check_files, local_base
    from qlora_ray.planning.rows import layout

    check_files(config)
    folder = storage.open_folder(config.ray.storage_path)
    storage.check_writable(folder)
    check_records(config)
    connect.set_environment(config, debug)

    def runner():
        if not connect.address(config):
            return run_on_cores
        connect.start_ray(config, debug)
        return run_on_ray

    made = prepare(config, folder, layout(config, read_facts(local_base(config))), runner, _tell)
    rows = show_rows(made, encoder_of(make_recipe(config)).tokenizer, num_rows) if num_rows else []
    return {**describe(made), "rows": rows}


def _check(config: Config, debug: bool) -> dict[str, Any]:
    import time

    from qlora_ray.cluster import connect
    from qlora_ray.data.faults import Base
    from qlora_ray.data.prepare import make_recipe
    from qlora_ray.data.quality import Quality
    from qlora_ray.data.sources import find_sources
    from qlora_ray.data.work import encoder_of
    from qlora_ray.model.answer import stop_token_ids
    from qlora_ray.model.untrained import generation_config_of, untrained_tokens
    from qlora_ray.planning.early import check_files, local_base

    began = time.perf_counter()
    check_files(config)
    connect.set_environment(config, debug)
    folder = local_base(config)
    encoder = encoder_of(make_recipe(config))
    stops = frozenset(stop_token_ids(generation_config_of(folder, config.model), encoder.tokenizer))
    unseen = untrained_tokens(folder, encoder.tokenizer)
    if unseen is not None:  # rows of new tokens are trained
        unseen -= frozenset(encoder.tokenizer.convert_tokens_to_ids(config.model.new_tokens))
    quality = Quality(config, Base(encoder, stops, unseen), _tell)
    quality.look({key: find_sources(config, key) for key in ("train_file", "validation_file")})
    return {**quality.report(), "seconds": round(time.perf_counter() - began, 1)}


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _show_check(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(f"{found['num_records']:,} records, {found['num_usable']:,} usable, {found['num_validation']:,} of "
                  f"these for validation; looked at in {found['seconds']:,.1f} s")  # fmt: skip
    table = Table("records", "share", "what", "what to do")
    for one in found["findings"].values():
        if one["records"]:
            table.add_row(f"{one['records']:,}", f"{one['share']:.1%}", one["what"], one["advice"])
    if table.row_count:
        console.print(table)
    faults, unknown = found["findings"], found["not_checked"]
    clean = [one["what"] for kind, one in faults.items() if not one["records"] and kind not in unknown]
    console.print(Text(f"none: {'; '.join(clean)}", style="dim"))
    for one in found["findings"].values():
        if one["examples"]:
            console.print(f"\n[bold]{one['what']}[/]")
        for example in one["examples"]:
            console.print(Text.assemble((example["place"], "cyan"), "  ", (_visible(example["why"]), "yellow")))
            console.print(Text("  " + " ↵ ".join(_visible(example["text"]).split("\n")), style="dim"))
    for kind, why in found["not_checked"].items():
        say_note(f"{found['findings'][kind]['what']}: {why}.")


def _visible(text: str) -> str:
    return text.replace("\x1b", "␛")  # a record shall not steer the terminal


def _show(data: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, value in _lines(data).items():
        table.add_row(name, value)
    console.print(table)
    for note in data["notes"]:
        say_note(note)
    for name in (*data["rejected_files"], data["cache_entry"]):
        console.print(name, style="dim", soft_wrap=True)
    console.print("\n[bold]tokens per sample[/]")
    most = max(one["samples"] for one in data["length_histogram"])
    for one in data["length_histogram"]:
        bar = "█" * -(-40 * one["samples"] // most)
        console.print(f"{one['from']:>7,} to {one['to']:>6,}  {bar} {one['samples']:,}")
    for number, row in enumerate(data["rows"]):
        console.print(f"\n[bold]row {number}[/]: {row['num_tokens']:,} tokens, {row['num_label_tokens']:,} trained on "
                      "([bold green]green[/])")  # fmt: skip
        if "pairs" in row:
            _show_pairs(row["pairs"])
            continue
        text = Text()
        for i, piece in enumerate(row["pieces"]):
            if i and piece["sample"] != row["pieces"][i - 1]["sample"]:
                text.append("\n┄┄ next sample, which does not see the one above ┄┄\n", style="cyan")
            if not piece["trained"] and "desirable" in piece:
                text.append("desirable\n" if piece["desirable"] else "undesirable\n", style="cyan")
            text.append(_visible(piece["text"]), style="bold green" if piece["trained"] else "dim")
        console.print(text)


def _show_pairs(pairs: list[dict[str, Any]]) -> None:
    """Pairs side by side; what differs between the answers is underlined."""
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", "chosen", "rejected", show_lines=True)
    for pair in pairs:
        answers = []
        for name in ("chosen", "rejected"):
            pieces = ((one, "underline" if one["differs"] else "") for one in pair[name])
            answers.append(Text.assemble(*((_visible(one["text"]), f"bold green {style}") for one, style in pieces)))
        table.add_row(Text(_visible(pair["prompt"]), style="dim"), *answers)
    console.print(table)


def _lines(data: dict[str, Any]) -> dict[str, str]:
    rejected = "; ".join(f"{count:,} {reason}" for reason, count in data["rejected"].items()) or "none"
    room = data["max_length"] * (2 if data["shares_prompts"] else 1)
    rows = f"{data['num_rows']:,} of {room:,} tokens"
    what = "pair" if data["pairs"] and not data["labelled"] else "sample"
    per_row = data["num_samples"] / data["num_rows"] / (2 if what == "pair" else 1)
    how = ", behind shared prompts" if data["shares_prompts"] else ", in two rows of tokens" if data["pairs"] else ""
    held = f"{per_row:.1f} {what}s each{how}"
    packed = f"{rows}, {data['packing_efficiency']:.1%} full, {held}"
    return {
        "records": f"{data['num_records']:,} read, {data['num_rejected']:,} rejected, {data['num_truncated']:,} cut "
        f"to max_length",
        "formats": ", ".join(f"{name} ({count:,})" for name, count in data["formats"].items()),
        "samples": f"{data['num_samples']:,} an epoch, median {data['median_length']:,.0f} tokens, longest "
        f"{data['longest_sample']:,}",
        "rows": packed if data["packed"] else f"{data['num_rows']:,}, one {what} each, padded",
        "tokens": f"{data['num_tokens']:,} an epoch, {data['num_label_tokens']:,} of them ({data['label_share']:.1%}) "
        "trained on",
        "held out": f"{data['num_validation_samples']:,} samples in {data['num_validation_rows']:,} rows, "
        f"{data['num_validation_label_tokens']:,} tokens trained on",
        "rejected": rejected,
    }


if __name__ == "__main__":
    sys.exit(main())
