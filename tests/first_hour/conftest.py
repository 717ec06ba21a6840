"""What the first hour leaves: runs that several of its tests look at. Each command is a fresh process."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration import door

CAPITALS = {
    "Peru": "Lima", "Japan": "Tokyo", "Kenya": "Nairobi", "Norway": "Oslo", "Egypt": "Cairo", "Cuba": "Havana",
    "Chile": "Santiago", "Ghana": "Accra", "Iraq": "Baghdad", "Spain": "Madrid", "Italy": "Rome", "Greece": "Athens",
    "Poland": "Warsaw", "Qatar": "Doha", "Nepal": "Kathmandu", "Mali": "Bamako", "Togo": "Lome", "Laos": "Vientiane",
    "Oman": "Muscat", "Fiji": "Suva",
}  # fmt: skip


@pytest.fixture(scope="session")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("first_hour")


@pytest.fixture(scope="session")
def quickstart(storage):
    """The run of `make quickstart`, and what it said."""
    ended = door.run(f"ray.storage_path={storage}", "ray.run_name=quickstart")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return storage / "quickstart", ended


@pytest.fixture(scope="session")
def my_yaml(storage) -> Path:
    """A config for chats of one's own, forty lines of JSON."""
    chats = storage / "chats.jsonl"
    with chats.open("w") as file:
        for country, capital in CAPITALS.items():
            for question in (f"What is the capital of {country}?", f"Capital of {country}?"):
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": capital}]
                file.write(json.dumps({"messages": turns}) + "\n")
    config = storage / "my.yaml"
    config.write_text(
        "model: {base_model: embedded}\n"
        "training: {max_steps: 60, learning_rate: 3.0e-3, max_length: 128}\n"
        f"data: {{train_file: {chats}}}\n"
        f"ray: {{storage_path: {storage}}}\n"
    )
    return config


@pytest.fixture(scope="session")
def killed_and_resumed(my_yaml, storage):
    """The run of my.yaml, killed with everything it had started and resumed: its lines before, and the end."""
    driver = door.start("-c", str(my_yaml))
    whole_checkpoints = "my*/checkpoints/step_*/manifest.json"
    door.wait_for(lambda: list(storage.glob(whole_checkpoints)), driver, "checkpoint")
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    run = next(storage.glob(whole_checkpoints)).parents[2]
    before = door.metrics(run)
    ended = door.run("-c", str(my_yaml), "--resume")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return run, before
