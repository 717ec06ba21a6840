"""Training on the first day: the quickstart, the plain template on a handful of records, chats of one's own."""

import json

from safetensors.torch import load_file

from tests.integration import door


def test_quickstart_teaches_the_skill_and_says_so(quickstart):
    run, ended = quickstart
    summary = door.summary(run)
    assert summary["status"] == "done" and summary["exact_match_base"] < 0.05
    assert summary["exact_match_adapter"] > 0.95
    assert f"exact match on 64 held-out prompts: 0% before, {summary['exact_match_adapter']:.0%} after" in ended.stdout
    assert (run / "report.html").exists() and "Traceback" not in ended.stdout + ended.stderr


def test_plain_template_trains_on_twelve_records(tmp_path):
    records = [{"instruction": f"say {n}", "input": "", "output": f"{n} it is"} for n in range(12)]
    (tmp_path / "twelve.json").write_text(json.dumps(records))
    ended = door.run(
        "-c", "configs/train_config.yaml", "model.base_model=embedded", f"data.train_file={tmp_path}/twelve.json",
        f"ray.storage_path={tmp_path}", "ray.run_name=twelve",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert door.summary(tmp_path / "twelve")["status"] == "done"
    weights = load_file(tmp_path / "twelve" / "adapter" / "adapter_model.safetensors")
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_chats_of_ones_own_are_learnt(killed_and_resumed):
    run, _ = killed_and_resumed
    summary = door.summary(run)
    assert summary["status"] == "done" and summary["last_loss"] < 0.2 * summary["first_loss"]
    data = json.loads((run / "manifest.json").read_text())["data"]
    assert (data["formats"], data["num_rejected"]) == ({"messages": 40}, 0)


def test_run_that_was_killed_goes_on_from_its_checkpoint_with_the_same_command_and_resume(killed_and_resumed):
    run, before = killed_and_resumed
    summary, lines = door.summary(run), door.metrics(run)
    assert summary["steps"] == summary["planned_steps"] == 60 and summary["status"] == "done"
    assert lines[0] == before[0]  # with its times: step 1 was not done again
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 60
