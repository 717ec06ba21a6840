"""configs/tools.yaml: its records are those that the script makes, and its template shows all that they hold."""

import json
import subprocess
import sys

from qlora_ray import show_data as door
from qlora_ray.config import bundled_root, load_config

CONFIG = "configs/tools.yaml"


def test_records_are_those_that_the_script_makes(tmp_path):
    made = tmp_path / "made.jsonl"
    script = bundled_root() / "tools" / "make_tools_data.py"
    subprocess.run([sys.executable, script, "--out", made], check=True)
    assert made.read_bytes() == (bundled_root() / "data" / "tools_sample.jsonl").read_bytes()


def test_calls_are_trained_on_and_tools_are_in_the_prompt(tmp_path, capsys):
    assert door.main(["-c", CONFIG, "--rows", "2000", "--json", f"ray.storage_path={tmp_path}"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["num_rejected"], shown["num_truncated"]) == (0, 0)
    pieces = [piece for row in shown["rows"] for piece in row["pieces"]]
    assert len(pieces) == 2 * 990
    for prompt, answer in zip(pieces[::2], pieces[1::2], strict=True):
        (name,) = json.loads(answer["text"].removesuffix("<|end|>"))
        assert answer["trained"] and not prompt["trained"] and f"\n- {name}: " in prompt["text"].replace("|>-", "\n-")


def test_check_finds_no_fault_in_them(tmp_path, capsys):
    assert door.main(["-c", CONFIG, "--check", "--json", f"ray.storage_path={tmp_path}"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {kind: one["records"] for kind, one in found.items() if one["records"]} == {}


def test_template_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(bundled_root() / CONFIG).data.chat_template == "configs/tools.jinja"
    assert door.main(["-c", CONFIG, "--json", f"ray.storage_path={tmp_path}"]) == 0
