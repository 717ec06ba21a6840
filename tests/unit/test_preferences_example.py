"""configs/dpo.yaml: its pairs are those that the script makes, and none has a fault."""

import json
import subprocess
import sys

from qlora_ray import show_data as door
from qlora_ray.config import bundled_root

CONFIG = "configs/dpo.yaml"


def test_pairs_are_those_that_the_script_makes(tmp_path):
    made = tmp_path / "made.jsonl"
    script = bundled_root() / "tools" / "make_preferences_data.py"
    subprocess.run([sys.executable, script, "--out", made], check=True)
    assert made.read_bytes() == (bundled_root() / "data" / "preferences_sample.jsonl").read_bytes()


def test_pairs_are_shown_side_by_side_with_what_differs(tmp_path, capsys):
    assert door.main(["-c", CONFIG, "--rows", "300", "--json", f"ray.storage_path={tmp_path}"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["num_rejected"], shown["num_truncated"], shown["num_samples"]) == (0, 0, 1080)
    pairs = [pair for row in shown["rows"] for pair in row["pairs"]]
    assert len(pairs) == 540
    for pair in pairs:
        assert pair["prompt"].startswith("<|bos|><|user|>Turn the sentence into a list.")
        chosen, rejected = ("".join(piece["text"] for piece in pair[side]) for side in ("chosen", "rejected"))
        assert chosen.startswith("name=") and rejected.startswith("- name: ")
        assert any(piece["differs"] for piece in pair["chosen"]) and any(piece["differs"] for piece in pair["rejected"])


def test_check_finds_no_fault_in_them(tmp_path, capsys):
    assert door.main(["-c", CONFIG, "--check", "--json", f"ray.storage_path={tmp_path}"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {kind: one["records"] for kind, one in found.items() if one["records"]} == {}


def test_terminal_shows_both_answers_of_a_pair(tmp_path, capsys):
    assert door.main(["-c", CONFIG, "--rows", "1", f"ray.storage_path={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "180 of 256 tokens" in out  # a row has room for twice training.max_length
    assert "chosen" in out and "rejected" in out and "name=" in out and "- name:" in out


def test_terminal_shows_whether_each_answer_is_desirable_and_what_was_left_out_and_cut(tmp_path, capsys):
    asked, said = {"role": "user", "content": "Hi?"}, "word " * 200
    labelled = [{"messages": [asked, {"role": "assistant", "content": f"{i}"}], "label": i % 3 > 0} for i in range(30)]
    labelled += [{**labelled[1], "messages": [asked, {"role": "assistant", "content": said}]}]
    labelled += [{**labelled[0], "label": "bad"}] * 2
    (tmp_path / "labelled.json").write_text(json.dumps(labelled))
    asked = ["training.objective=kto", "training.rpo_alpha=0", f"data.train_file={tmp_path}/labelled.json"]
    asked += ["data.max_bad_fraction=0.5", f"ray.storage_path={tmp_path}"]
    assert door.main(["-c", CONFIG, "--rows", "99", *asked]) == 0
    out = capsys.readouterr().out
    shown = [line for line in out.splitlines() if line in ("desirable", "undesirable")]
    assert 0 < shown.count("undesirable") <= 10 < shown.count("desirable") <= 21
    assert "2 rejected" in out and "1 cut to max_length" in out and "2 `label` is neither true nor false" in out
