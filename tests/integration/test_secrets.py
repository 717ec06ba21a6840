"""A run on a private Ray with canaries for keys: they are in nothing it leaves."""

import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from tests.integration import door

SECRETS = {
    "HF_TOKEN": "hf_canaryCANARYcanary0123456789",
    "WANDB_API_KEY": "canary0wandb0canary0wandb0canary0wandb0a",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/secret/canary/aws/secret",
    "https_proxy": "http://someone:canary-proxy-password@127.0.0.1:9",
}


@pytest.fixture
def short_folder():
    """Ray's sockets live in its folder, and their paths may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="qr", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_private_run_leaves_no_secret_behind(tmp_path, short_folder, monkeypatch):
    """Not in the run's folder, what it said, or Ray's session logs; and only its owner can read the token."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    token = short_folder / "auth_token"
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    ended = door.run(
        f"ray.storage_path={tmp_path}", "ray.run_name=a", "ray.num_workers=1", "training.max_steps=2",
        "training.eval_every_steps=9", "evaluation.num_prompts=0", "--debug",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    values = [value.encode() for value in (*SECRETS.values(), token.read_text())]
    left = [path for root in (tmp_path, short_folder) for path in root.rglob("*") if path.is_file() and path != token]
    assert any("session_" in str(path) for path in left) and any(path.name == "manifest.json" for path in left)
    assert [str(path) for path in left if any(value in path.read_bytes() for value in values)] == []
    assert not any(value in (ended.stdout + ended.stderr).encode() for value in values)
