"""A storage path with runs in every state and a sweep, as their files lie there; and a server of its pages."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def line(step: int, began: float, **more: float) -> dict:
    return {"step": step, "loss": 3 - step / 100, "learning_rate": 2e-4, "time": began + 2.0 * step, **more}


def write_run(folder: Path, last_step: int, *, status: str | None = None, age: float = 0.0) -> Path:
    """A run of 100 steps that has come so far, with a line each ten steps, the last `age` seconds ago."""
    folder.mkdir(parents=True)
    began = time.time() - age - 2.0 * last_step
    lines = [line(step, began) for step in range(10, last_step + 1, 10)]
    lines += [{"step": last_step, "eval_loss": 2.0, "time": began + 2.0 * last_step}]
    (folder / "config.yaml").write_text(f"training: {{learning_rate: {last_step}.0e-6}}\n")
    (folder / "plan.json").write_text(json.dumps({"num_steps": 100}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    if status:
        (folder / "summary.json").write_text(json.dumps({"status": status, "steps": last_step, "reason": None}))
    for path in folder.iterdir():
        os.utime(path, (time.time() - age,) * 2)
    return folder


def append(folder: Path, step: int, **more: float) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(step, time.time() - 2.0 * step, **more)) + "\n")


def write_all(root: Path) -> None:
    write_run(root / "going", 50)
    write_run(root / "whole", 100, status="done", age=4000)
    write_run(root / "left", 30, status="interrupted", age=5000)
    write_run(root / "silent", 40, age=7200)
    (write_run(root / "damaged", 20) / "metrics.jsonl").write_text('{"step": 1}\nnot json\n')
    (root / "begun").mkdir()
    (root / "begun" / "config.yaml").write_text("{}")
    (root / "cache").mkdir()
    sweep = root / "sweep"
    write_run(sweep / "trials" / "t0000", 100, status="done")
    write_run(sweep / "trials" / "t0001", 60)
    rates = {"t0000": 1e-3, "t0001": 1e-4, "t0002": 1e-5}
    events = [{"event": "sweep", "definition": {}}, {"event": "session"}]
    events += [{"event": "trial", "trial": n, "parameters": {"training.learning_rate": r}} for n, r in rates.items()]
    events += [{"event": "end", "trial": "t0000", "status": "done", "reason": None}]
    (sweep / "trials.jsonl").write_text("".join(json.dumps({**one, "time": time.time()}) + "\n" for one in events))
    (sweep / "sweep.html").write_text("<!doctype html><title>all trials</title>")


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    """Runs python -m qlora_ray.report --serve; yields its address, and holds that Ctrl-C ends it with 0."""
    command = [sys.executable, "-m", "qlora_ray.report", "--serve", str(root), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert address, said + process.stderr.read()
        yield address[0]
    finally:
        process.send_signal(2)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
