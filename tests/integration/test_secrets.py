"""A run with --debug on a private Ray with canaries for keys: they are in nothing it leaves, and all else is said."""

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


@pytest.fixture(scope="module")
def short_folder():
    """Ray's sockets live in its folder, and their paths may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="qr", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(storage, short_folder):
    """A run with --debug."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("RAY_TMPDIR", str(short_folder))
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(short_folder / "auth_token"))
        patch.delenv("RAY_AUTH_MODE", raising=False)
        return door.run(
            f"ray.storage_path={storage}", "ray.run_name=a", "ray.num_workers=1", "training.max_steps=2",
            "training.eval_every_steps=9", "evaluation.num_prompts=0", "--debug",
        )  # fmt: skip


def test_debug_shows_every_parameter(ended):
    table = [line for line in (ended.stdout + ended.stderr).splitlines() if "q_proj" in line]
    assert any("4-bit" in line and "no" in line for line in table)
    assert any("float32" in line and "lora_A" in line and "yes" in line for line in table)


def test_private_run_leaves_no_secret_behind(ended, storage, short_folder):
    """Not in the run's folder, what it said, or Ray's session logs; and only its owner can read the token."""
    assert ended.returncode == 0, ended.stderr
    token = short_folder / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    values = [value.encode() for value in (*SECRETS.values(), token.read_text())]
    left = [path for root in (storage, short_folder) for path in root.rglob("*") if path.is_file() and path != token]
    assert any("session_" in str(path) for path in left) and any(path.name == "manifest.json" for path in left)
    assert [str(path) for path in left if any(value in path.read_bytes() for value in values)] == []
    assert not any(value in (ended.stdout + ended.stderr).encode() for value in values)
