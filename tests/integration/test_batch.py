"""A file of prompts: answers come in order, bad rows are reported in their place, a killed run ends as a whole one."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qlora_ray import generate
from qlora_ray.errors import BadRecord
from qlora_ray.inference.batch import Answerer, Job, to_prompt
from qlora_ray.model.record import open_adapter
from tests.integration import door

BATCH_SIZE, NUM_ROWS, NEW_TOKENS = 4, 62, 12


def lines():
    rows = [json.dumps({"id": i, "prompt": f"Copy: {i} green trees"}) for i in range(NUM_ROWS)]
    rows[5] = '{"prompt": '
    rows[9] = json.dumps({"prompt": "word " * 2000})
    rows[10] = json.dumps({"text": "no prompt"})
    return rows


def start(trained, source, target, workers) -> subprocess.Popen:
    return door.start(
        "--adapter", str(trained), "--input", str(source), "--output", str(target), "--workers", workers,
        "--batch-size", str(BATCH_SIZE), f"max_new_tokens={NEW_TOKENS}", of="generate",
    )  # fmt: skip


@pytest.mark.slow
def test_killed_batch_that_is_started_again_gives_the_file_of_one_that_was_not(trained, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(row + "\n" for row in lines()))
    partial = Path(f"{target}.partial")
    killed = start(trained, source, target, "1")
    deadline = time.monotonic() + 240
    while not (partial.exists() and partial.stat().st_size):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    num_done = len(partial.read_text().splitlines())
    assert 0 < num_done < NUM_ROWS and not target.exists()
    with partial.open("a") as file:
        file.write('{"row": torn')

    changed = ["--adapter", str(trained), "--input", str(source), "--output", str(target), "max_new_tokens=25"]
    assert generate.main([*changed, "--batch-size", str(BATCH_SIZE)]) == 2
    assert "was begun with another options" in capsys.readouterr().err

    again = start(trained, source, target, "2")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert f"{num_done} of {NUM_ROWS} rows are answered already" in err and "3 could not be answered: row 5" in err
    assert out == "" and not [noise for noise in ("WARNING", "INFO", "Traceback", "Error") if noise in err], err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]

    job = Job(open_adapter(str(trained)), {"max_new_tokens": NEW_TOKENS}, BATCH_SIZE, False, 0, [])
    whole = Answerer(job)
    expected = []
    for number in range(0, -(-NUM_ROWS // BATCH_SIZE)):
        some = json.dumps(lines()[number * BATCH_SIZE : (number + 1) * BATCH_SIZE])
        expected += json.loads(whole({"number": [number], "lines": [some]})["texts"][0])
    written = target.read_text().splitlines()
    assert written == expected
    rows = [json.loads(row) for row in written]
    assert [row["row"] for row in rows] == list(range(NUM_ROWS))
    assert rows[7]["input"]["id"] == 7 and "answer" in rows[7]
    assert rows[5]["error"].startswith("not JSON") and "context of 1,024" in rows[9]["error"]
    assert rows[10]["error"] == "no `prompt`, `messages` or `instruction`"


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "a"}, [("system", "s"), ("user", "a")]),
        ({"instruction": "a", "input": "b", "output": "c"}, [("system", "s"), ("user", "a\n\nb")]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         [("system", "s"), ("user", "a")]),
        ({"messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "a"}]},
         [("system", "t"), ("user", "a")]),
    ],
)  # fmt: skip
def test_each_shape_of_row_becomes_the_messages_to_answer(record, turns):
    assert [
        (turn["role"], turn["content"])
        for turn in to_prompt(json.dumps(record), [{"role": "system", "content": "s"}])[1]
    ] == turns


NOT_ROWS = ["", "[1]", "3", '{"prompt": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}']
NOT_ROWS += ['{"messages": [{"role": "system", "content": "x"}]}', '{"prompt": "\\ud800"}']


@pytest.mark.parametrize("row", NOT_ROWS)
def test_bad_row_is_named_not_fatal(row):
    with pytest.raises(BadRecord):
        to_prompt(row, [])
