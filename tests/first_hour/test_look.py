"""Looking before the first day's long run: the data, the plan, the nodes; and a sweep of two."""

import json

from tests.integration import door


def test_data_shows_what_the_model_will_see(my_yaml):
    ended = door.run("-c", str(my_yaml), "--json", of="data")
    assert ended.returncode == 0, ended.stderr
    shown = json.loads(ended.stdout)
    assert (shown["num_rejected"], shown["formats"]) == (0, {"messages": 40})
    (trained,) = {piece["trained"] for row in shown["rows"] for piece in row["pieces"] if "Lima" in piece["text"]}
    assert trained


def test_plan_says_what_fits(my_yaml):
    ended = door.run("-c", str(my_yaml), "--gpus", "2", "--gib", "24", of="plan")
    assert ended.returncode == 0, ended.stderr
    assert "2 x 24 GiB" in ended.stdout and "does not fit" not in ended.stdout


def test_doctor_finds_this_machine_ready(storage):
    ended = door.run(f"ray.storage_path={storage}", of="doctor")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "ready" in ended.stdout


def test_sweep_of_two_ends_with_the_better_adapter(storage):
    ended = door.run(
        "-c", "configs/sweep.yaml", "sweep.num_trials=2", "training.max_steps=20", "evaluation.num_prompts=0",
        f"ray.storage_path={storage}", "ray.run_name=sweep", of="tune",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    sweep = storage / "sweep"
    best = door.summary(sweep)["best"]
    reports = [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]
    losses = {event["trial"]: event["eval_loss"] for event in reports if event["event"] == "report"}
    assert len(losses) == 2 and best["trial"] == min(losses, key=losses.__getitem__)
    trained = sweep / "trials" / best["trial"] / "adapter_best" / "adapter_model.safetensors"
    assert door.sha256(sweep / "adapter" / "adapter_model.safetensors") == door.sha256(trained)
