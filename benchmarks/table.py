"""All that this package is said to be fast at, in one table: each figure beside what it must be, with its commands.

    python -m benchmarks.table                          # an hour on one GPU; peers run where they are installed
    python -m benchmarks.table --rows dropout start     # those alone
    python -m benchmarks.table --rows quickstart steps  # what needs no GPU

Runs the benchmarks that the figures are from, one after the other, each figure's both sides on the same card.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 1800  # of one command
OUT = "{out}"  # in a command: where it writes its results
PRODUCT = ("product", "--steps", "30")
CHATS = ("product", "--chats", "--steps", "20", "training.packing=true")
FAMILIES = "phi-4-mini", "granite-3-8b", "olmo2-7b", "smollm3-3b", "glm4-9b"


@dataclass(frozen=True)
class Row:
    """A figure: the commands that it takes (`python -m benchmarks.<...>`), and how it is read off what they print."""

    what: str
    must: str
    commands: tuple[tuple[str, ...], ...]
    read: Callable[..., str]  # of what each command has printed, or written to OUT


def speed(made: str) -> float:
    """Of one run of benchmarks.product."""
    return json.loads(made)["tokens_per_second"]


def ratio(made: str, against: str) -> str:
    """Of the first run's speed to the second's."""
    return f"{speed(made) / speed(against):.3f}"


def against_unsloth(made: str) -> str:
    """Of each shape in the results of benchmarks.throughput, with both sides' memory."""
    told: dict[str, dict[str, Any]] = {}
    for result in json.loads(made):
        side = "unsloth" if result["variant"].startswith("unsloth") else "ours"
        told.setdefault(result["shape"].partition(",")[0], {})[side] = result
    shown = []
    for shape, sides in told.items():
        if len(sides) < 2:
            shown.append(f"{shape} -: one side alone ran")
            continue
        ours, theirs = sides["ours"], sides["unsloth"]
        quotient = ours["tokens_per_second"] / theirs["tokens_per_second"]
        shown.append(f"{shape} {quotient:.3f} ({ours['peak_gib']:.2f} and {theirs['peak_gib']:.2f} GiB)")
    return ", ".join(shown)


def of_llamas_share(made: str) -> str:
    """Of each line of benchmarks.families but Llama's own."""
    lines = [json.loads(line) for line in made.splitlines() if line.startswith("{")]
    return ", ".join(f"{line['shape']} {line['of_llamas_share']:.3f}" for line in lines[1:])


def dora(made: str) -> str:
    """DoRA's speed of LoRA's."""
    speeds = {result["variant"]: result["tokens_per_second"] for result in json.loads(made)}
    return f"{speeds['ours_dora_stage3'] / speeds['ours_stage3']:.3f}"


def of_chats(made: str) -> str:
    """Ours against each of Unsloth's ways."""
    return ", ".join(f"{side} {value}" for side, value in re.findall(r"^ours / (\S+): (\S+)$", made, re.MULTILINE))


def to_first_step(*made: str) -> str:
    """Seconds of the runs after the first, which fills caches: until the first step begins, and until it is done."""
    seconds = [json.loads(one)["seconds"] for one in made[1:]]
    return ", ".join(f"{one['to_first_step']:.1f} ({one['first_step_done']:.1f} with it)" for one in seconds)


def of_quickstart(made: str) -> str:
    """Median seconds until the first step, of benchmarks.startup's table."""
    (found,) = re.findall(r"first optimizer step[^|]*\| ([0-9.]+) \|", made)
    return found


def errors(made: str) -> str:
    """Of the memory forecasts."""
    found = sorted(abs(result["error"]) for result in json.loads(made))
    return f"{found[-1]:.1%} at most, {statistics.median(found):.1%} median, of {len(found)} cases"


ROWS = {
    "dropout": Row("Llama-3.1-8B, dropout 0.1 against 0", ">= 0.96",
                   ((*PRODUCT, "model.lora_dropout=0.1"), PRODUCT), ratio),
    "unsloth": Row("against Unsloth, nothing recomputed", "Llama >= 1.08, Qwen3 >= 1.08, Gemma3 >= 1.1",
                   (("throughput", "--out", OUT, "--variants", "ours_stage3:all,weights", "unsloth:all", "--shapes",
                     "llama-8b", "qwen3-8b", "gemma3-4b"),), against_unsloth),
    "within": Row("Qwen3-8B within the memory of Unsloth that recomputes", ">= 1.1",
                  (("throughput", "--out", OUT, "--variants", "ours_stage3:host", "unsloth:host", "--shapes",
                    "qwen3-8b", "--steps", "6"),), against_unsloth),
    "families": Row("share of the floor against Llama's", ">= 0.93",
                    (("families", "--steps", "6", "--shapes", *FAMILIES),), of_llamas_share),
    "dora": Row("DoRA against LoRA, stage 3", ">= 0.85",
                (("throughput", "--out", OUT, "--steps", "6", "--variants", "ours_stage3:all",
                  "ours_dora_stage3:all"),), dora),
    "labels": Row("packed chats, a third of the tokens labelled, against all labelled", ">= 1.05",
                  (CHATS, (*CHATS, "data.train_on=everything")), ratio),
    "chats": Row("the same chats against Unsloth's packing and padding-free, 8 layers", ">= 1.2",
                 (("chats", "--layers", "8"),), of_chats),
    "template": Row("gpt2-medium, template settings, against transformers' Trainer", ">= 1.5",
                    (("template_vs_trainer",),), lambda made: f"{json.loads(made)['ours_over_trainer']:.2f}"),
    "start": Row("command to first step, 8B, warm files, s", "<= 20",
                 (("product", "--steps", "5"),) * 3, to_first_step),
    "quickstart": Row("command to first step, quickstart, s", "<= 12 on 2 cores", (("startup", "3"),), of_quickstart),
    "steps": Row("200 quickstart steps against the Trainer's time", "<= 1.15 on 2 cores",
                 (("quickstart_vs_trainer",),),
                 lambda made: f"{json.loads(made)['ours_over_trainer']['seconds_in_steps']:.2f}"),
    "memory": Row("forecast of memory", "<= 5%", (("memory", "--at-once", "9", "--out", OUT),), errors),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    print("| what | must | measured | `python -m benchmarks.` |\n|---|---|---|---|", flush=True)
    failed = False
    for name in arguments.rows:
        row = ROWS[name]
        try:
            figure = row.read(*map(run, row.commands))
        except subprocess.SubprocessError as error:
            figure, failed = f"- {error}", True
            print(getattr(error, "stderr", None) or "", file=sys.stderr)
        shown = "; ".join(f"`{' '.join(command)}`" for command in dict.fromkeys(row.commands))
        print(f"| {row.what} | {row.must} | {figure} | {shown} |", flush=True)
    sys.exit(failed)


def run(command: tuple[str, ...]) -> str:
    """What a benchmark printed, or wrote to OUT. Raises SubprocessError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        given = [str(out) if word == OUT else word for word in command[1:]]
        ran = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{command[0]}", *given],
            capture_output=True, text=True, timeout=SECONDS, check=True,
        )  # fmt: skip
        return out.read_text() if OUT in command else ran.stdout


if __name__ == "__main__":
    main()
