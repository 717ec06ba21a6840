"""The table of figures reads them off what the benchmarks print."""

import json
import subprocess
import sys

import pytest

from benchmarks import table


@pytest.mark.parametrize("name", table.ROWS)
def test_every_command_is_one_that_its_benchmark_takes(name):
    for command in dict.fromkeys(table.ROWS[name].commands):
        ran = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{command[0]}", "--help"], capture_output=True, text=True
        )
        options = [word for word in command if word.startswith("--")]
        assert ran.returncode == 0 and all(option in ran.stdout for option in options)


def test_figures_are_those_of_the_sides_that_ran():
    fast, slow = (json.dumps({"tokens_per_second": speed}) for speed in (120.0, 100.0))
    assert table.ratio(fast, slow) == "1.200"
    ours = {"shape": "qwen3-8b, 36 layers", "variant": "ours_stage3", "tokens_per_second": 12.0, "peak_gib": 8.06}
    theirs = {**ours, "variant": "unsloth", "tokens_per_second": 10.0, "peak_gib": 8.3}
    assert table.against_unsloth(json.dumps([theirs, ours])) == "qwen3-8b 1.200 (8.06 and 8.30 GiB)"
    assert table.against_unsloth(json.dumps([ours])) == "qwen3-8b -: one side alone ran"
    lines = [{"shape": "llama-8b", "of_llamas_share": 1.0}, {"shape": "olmo2-7b", "of_llamas_share": 0.93}]
    assert table.of_llamas_share("\n".join(map(json.dumps, lines))) == "olmo2-7b 0.930"
    assert table.of_chats("ours {}\nours / unsloth_packing: 1.562\n") == "unsloth_packing 1.562"
    runs = [json.dumps({"seconds": {"to_first_step": s, "first_step_done": s + 2}}) for s in (28.0, 18.0, 16.0)]
    assert table.to_first_step(*runs) == "18.0 (20.0 with it), 16.0 (18.0 with it)"
    assert table.of_quickstart("| first optimizer step (quickstart) | 9.24 | 8.80, 9.24, 11.20 |") == "9.24"
    assert table.errors(json.dumps([{"error": -0.04}, {"error": 0.01}, {"error": 0.02}])).startswith("4.0% at most")
