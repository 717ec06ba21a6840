"""sweep.html: complete, self-contained, and true to the ledger."""

import json
import re

import pytest

from qlora_ray.config import make_config
from qlora_ray.sweep import page, results
from qlora_ray.sweep.capacity import Planned, Reports
from qlora_ray.sweep.charts import Axis
from qlora_ray.sweep.ledger import Ledger

LR, EVIL = "training.learning_rate", "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The page of nine trials, eight of which have reported, one of which went on from another; and its summary."""
    run = tmp_path_factory.mktemp("runs") / "sweep"
    config = make_config(
        {"sweep": {"parameters": {LR: {"loguniform": [1e-4, 1e-2]}, "model.lora_r": {"choice": [4, 8]}}}}
    )
    ledger = Ledger(run)
    ledger.append("session")
    for i in range(9):
        name = f"t{i:04d}"
        ledger.append("trial", trial=name, parameters={LR: 1e-4 * (i + 1), "model.lora_r": 4 + 4 * (i % 2)})
        (run / "trials" / name).mkdir(parents=True)
        losses = {10: 2.0 - 0.1 * i, 20: 1.0 - 0.1 * i} if i < 8 else {}
        lines = [{"step": step, "loss": loss, "eval_loss": loss, "num_tokens": 5} for step, loss in losses.items()]
        (run / "trials" / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for step, loss in losses.items():
            ledger.append("report", trial=name, step=step, eval_loss=loss)
        ledger.append("end", trial=name, status="done" if losses else "failed", reason=None if losses else EVIL)
    new = {LR: 5e-3, "model.lora_r": 4}
    ledger.append("exploit", trial="t0001", donor="t0007", step=20, sha256={}, parameters=new)
    planned = Planned(config, [], Reports(20, 10, 10, None), 1, "")
    summary = results.write_summary(run, ledger, planned, "done", None)
    text = page.write(run, config, ledger, summary).read_text()
    ledger.close()
    return re.sub(r"<script>/\*.*?</script>", "", text, count=1, flags=re.DOTALL), summary  # without plotly itself


def test_summary_says_what_the_ledger_says(rendered):
    summary = rendered[1]
    assert summary["best"] == {"trial": "t0007", "step": 20, "value": pytest.approx(0.3),
                               "parameters": {LR: pytest.approx(8e-4), "model.lora_r": 8}}  # fmt: skip
    assert summary["trials"] == {"done": 8, "failed": 1} and summary["tokens"] == 80 and summary["exploits"] == 1
    assert summary["failed"] == {"t0008": EVIL}


def test_page_has_every_trial_chart_and_exploit(rendered):
    text = rendered[0]
    assert all(f"<th>t{i:04d}</th>" in text for i in range(9))
    assert all(f'id="chart-{name}"' in text for name in ("loss", "eval_loss", "parallel", "importance"))
    assert "goes on from t0007, step 20" in text and "larger is better" in text


def test_page_loads_nothing_and_runs_nothing_of_what_trials_say(rendered):
    text = rendered[0]
    assert EVIL not in text and "&lt;img" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)


def test_curves_are_of_what_decides_and_of_losses_in_their_unit():
    sweep = {"parameters": {LR: {"loguniform": [1e-4, 1e-2]}}}
    assert page.curves(make_config({"sweep": sweep})) == {
        "eval_loss": "Validation loss, nats per token", "loss": "Training loss, nats per token",
    }  # fmt: skip
    metric = "eval_rewards/margins"
    training = {"objective": "dpo", "metric_for_best_model": metric}
    found = page.curves(make_config({"training": training, "sweep": {**sweep, "metric": metric}}))
    assert list(found) == [metric, "loss", "eval_loss"] and found["loss"] == "Training loss, mean over pairs"


def test_axis_places_by_size_by_logarithm_or_evenly():
    assert [Axis([1, 2, 3]).place(value) for value in (1, 2, 3)] == [0, 0.5, 1]
    assert [Axis([1e-4, 1e-2]).place(value) for value in (1e-4, 1e-3, 1e-2)] == pytest.approx([0, 0.5, 1])
    assert [Axis(["a", "b", "c"]).place(value) for value in "abc"] == [0, 0.5, 1]
    assert Axis([7, 7]).place(7) == 0.5 and Axis([True, False]).place(False) == 1
