"""configs/dpo.yaml, whole: asked for a list, the small base learns to answer in one line."""

import pytest

from tests.integration import door


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_held_out_answers_are_in_one_line_and_nine_pairs_in_ten_are_judged_right(tmp_path):
    ended = door.run("-c", "configs/dpo.yaml", f"ray.storage_path={tmp_path}", "ray.run_name=dpo", timeout=800)
    assert ended.returncode == 0, ended.stderr
    summary = door.summary(tmp_path / "dpo")
    assert summary["exact_match_base"] == 0 and summary["exact_match_adapter"] >= 0.9
    validations = [line for line in door.metrics(tmp_path / "dpo") if "eval_loss" in line]
    assert validations[-1]["eval_rewards/accuracies"] >= 0.9
