"""The script that begins each worker of a private Ray, as Ray's own would, but for its imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_ray.cluster import start_worker

PLAIN = {"command_prefix": [], "env_vars": {}, "py_executable": sys.executable, "java_jars": []}
WORKER = "import os, sys; print('worker', os.environ.get('ASKED'), sys.argv[1:])"
RAYS = "import os, sys; print('left to Ray', os.environ.get('ASKED'), sys.argv[1:])"


def begin(folder: Path, language="PYTHON", **context) -> str:
    (folder / "worker.py").write_text(WORKER)
    (folder / "setup.py").write_text(RAYS)
    arguments = [str(folder / "worker.py"), "--node-id=7", f"--language={language}"]
    arguments.append("--serialized-runtime-env-context=" + json.dumps({**PLAIN, **context}))
    command = [sys.executable, start_worker.__file__, str(folder / "setup.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "ASKED"}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return ended.stdout.strip()


def test_worker_has_its_arguments_and_the_variables_of_its_environment(tmp_path):
    assert begin(tmp_path) == "worker None ['--node-id=7']"
    assert begin(tmp_path, env_vars={"ASKED": "a b"}) == "worker a b ['--node-id=7']"


@pytest.mark.parametrize(
    "context",
    [
        {"env_vars": {"ASKED": "${HOME}/x"}}, {"py_executable": "uv run python"}, {"command_prefix": ["nice"]},
        {"override_worker_entrypoint": "/elsewhere.py"}, {"language": "JAVA"}, {"java_jars": ["a.jar"]},
    ],
    ids=lambda context: next(iter(context)),
)  # fmt: skip
def test_what_is_not_plain_is_left_to_rays_script_as_it_came(tmp_path, context):
    said = begin(tmp_path, **context)
    assert said.startswith("left to Ray None") and "--node-id=7" in said and "serialized-runtime-env-context" in said
