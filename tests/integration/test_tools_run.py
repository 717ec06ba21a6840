"""configs/tools.yaml, whole: the small base learns to call the right tool with what was said."""

import json

import pytest

from tests.integration import door


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_calls_to_held_out_requests_are_exact_nine_times_in_ten(tmp_path):
    arguments = ["-c", "configs/tools.yaml", f"ray.storage_path={tmp_path}", "ray.run_name=tools"]
    ended = door.run(*arguments, timeout=800)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "tools" / "summary.json").read_text())
    assert summary["exact_match_base"] == 0 and summary["exact_match_adapter"] >= 0.9
