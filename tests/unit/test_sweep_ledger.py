"""trials.jsonl through kills, torn lines and second drivers."""

import json
import os
import signal
import subprocess
import sys

import pytest

from qlora_ray.errors import ConfigError
from qlora_ray.sweep.ledger import FILE, Ledger


def fill(ledger):
    ledger.append("sweep", definition={"a": 1})
    ledger.append("session")
    for name in ("t0000", "t0001", "t0002"):
        ledger.append("trial", trial=name, parameters={"x": name})
    ledger.append("report", trial="t0000", step=10, eval_loss=1.0)
    ledger.append("end", trial="t0000", status="done", reason=None)
    ledger.append("report", trial="t0001", step=30, eval_loss=2.0)
    ledger.append("exploit", trial="t0001", donor="t0000", step=10, sha256={}, parameters={"x": "new"})


def test_what_was_appended_is_what_is_read(tmp_path):
    ledger = Ledger(tmp_path)
    fill(ledger)
    ledger.close()
    again = Ledger(tmp_path)
    assert again.definition == {"a": 1} and again.trials == ledger.trials
    assert [record.name for record in again.live()] == ["t0001", "t0002"]
    assert again.trials["t0001"].parameters == {"x": "new"} and again.trials["t0001"].first_parameters == {"x": "t0001"}
    assert again.trials["t0001"].reported == 10  # the step of the weights that it goes on with
    again.close()


def test_torn_last_line_does_not_count_at_any_byte_and_is_written_over(tmp_path):
    ledger = Ledger(tmp_path)
    fill(ledger)
    ledger.close()
    whole = (tmp_path / FILE).read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for length in range(last, len(whole)):
        (tmp_path / FILE).write_bytes(whole[:length])
        torn = Ledger(tmp_path)
        assert torn.trials["t0001"].exploits == [] and torn.trials["t0001"].reported == 30
        torn.append("end", trial="t0001", status="failed", reason="x")
        torn.close()
        lines = (tmp_path / FILE).read_bytes().splitlines()
        assert [json.loads(line)["event"] for line in lines][-2:] == ["report", "end"]


def test_damage_in_the_middle_is_refused(tmp_path):
    (tmp_path / FILE).write_text('{"event": "session", "time": 1}\nrubbish\n')
    with pytest.raises(ConfigError, match="line 2 is not an event"):
        Ledger(tmp_path)


def test_second_driver_of_the_same_sweep_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    with pytest.raises(ConfigError, match="another process runs this sweep"):
        Ledger(tmp_path)
    ledger.close()
    Ledger(tmp_path).close()


def test_killed_writer_leaves_every_event_that_it_had_appended(tmp_path):
    code = (
        "import sys; from pathlib import Path; from qlora_ray.sweep.ledger import Ledger\n"
        f"ledger = Ledger(Path({str(tmp_path)!r}))\n"
        "for i in range(10**6):\n"
        "    ledger.append('trial', trial=f't{i:04d}', parameters={'i': i}); print(i, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 50:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    told = [50, *map(int, writer.stdout.read().splitlines())]
    writer.wait()
    ledger = Ledger(tmp_path)
    assert len(ledger.trials) - 1 in (told[-1], told[-1] + 1)
    ledger.close()


def test_time_of_all_sessions_counts_up_to_the_last_event_of_each(tmp_path):
    events = [("session", 100), ("close", 130), ("session", 1000), ("close", 1007)]
    lines = [{"event": event, "time": time, "status": "done"} for event, time in events]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = Ledger(tmp_path)
    assert ledger.former_seconds == 37
    ledger.close()
