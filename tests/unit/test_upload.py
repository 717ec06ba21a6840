"""What `ray job submit --working-dir .` really uploads: the code, and no secret, run or cache."""

import shutil
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CANARY = "canary-3b9f2a"
LEFT_OUT = [
    ".env", ".env.local", "prod.env", ".netrc", ".aws/credentials", ".ssh/id_ed25519", ".kube/config", "server.pem",
    "tls.key", "id_rsa", "hf_token", "wandb_token.txt", "secrets.yaml", "my_credentials.json", "auth_token",
    ".ray/auth_token", ".cache/huggingface/token", "kubeconfig.yaml", "service-account-prod.json",
    "runs/a/adapter/adapter_model.safetensors", "runs/a/config.yaml", "wandb/run/x.wandb", "mlruns/0/meta.yaml",
    "mlflow.db", "models/llama/model.safetensors", "model.gguf", "checkpoint.pt", ".venv/bin/python",
    "qlora_ray/__pycache__/x.pyc", ".pytest_cache/v", ".git/config", "tests/unit/test_x.py", "train.log",
]  # fmt: skip
TAKEN = [
    "qlora_ray/train.py", "qlora_ray/data/tokenize.py", "qlora_ray/assets/tiny_base/model.safetensors",
    "qlora_ray/assets/tiny_base/tokenizer.json", "configs/quickstart.yaml", "configs/deepspeed_config.json",
    "data/sample_data.json", "my.yaml", "my_data/train.jsonl", "models/llama/tokenizer.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory) -> dict[str, bytes]:
    """Files of the package that Ray makes of a checkout full of canaries, by name."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

    checkout, package = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("upload") / "package.zip"
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, checkout / name)
    for name in [*LEFT_OUT, *TAKEN]:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{CANARY} {name}")
    excludes = get_runtime_env_default_excludes()
    assert get_uri_for_directory(str(checkout), include_gitignore=True, excludes=excludes)
    create_package(str(checkout), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_no_canary_of_a_secret_run_or_cache_is_in_the_upload(uploaded):
    held = b"\n".join(uploaded.values()).decode()
    assert [name for name in LEFT_OUT if f"{CANARY} {name}\n" in held + "\n"] == []


def test_what_a_run_needs_is_in_the_upload(uploaded):
    assert set(TAKEN) <= uploaded.keys()
