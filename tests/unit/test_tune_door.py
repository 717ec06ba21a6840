"""Bad input at the tune door: exit code 2, one message, nothing left behind; and --plan. Ray never starts."""

import pytest

from qlora_ray import cli, train, tune
from qlora_ray.cluster import connect
from qlora_ray.config import find_file


@pytest.fixture(autouse=True)
def ray_never_starts(monkeypatch):
    def start_ray(*_):
        raise AssertionError("Ray was about to start")

    monkeypatch.setattr(connect, "start_ray", start_ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def said(tmp_path, capsys):
    """Opens the door with overrides and returns its message, once nothing else has happened."""

    def open_door(*arguments: str, config: str = "configs/sweep.yaml") -> str:
        storage = tmp_path / "storage"
        assert tune.main(["-c", config, f"ray.storage_path={storage}", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in err
        assert not storage.exists()
        return err.removeprefix("error: ")

    return open_door


def test_config_without_a_sweep(said):
    assert said(config="configs/quickstart.yaml").startswith("sweep: the config has no such section")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ('sweep.parameters={"training.lerning_rate": {"choice": [1]}}', "Did you mean training.learning_rate?"),
        ('sweep.parameters={"training.learning_rate": {"uniform": [1, 1]}}', "empty range"),
        ("data.validation_split=0", "eval_loss: is never reported"),
        ("sweep.scheduler=pbt", "would not fit"),
        ("sweep.metric=accuracy", "sweep.metric=accuracy"),
        ('sweep.parameters={"training.objective": {"choice": ["sft", "dpo"]}}', "no `chosen`"),
        ("ray.num_workers=999", "999 x 1 CPU = 999, the cluster holds"),
        ("data.train_file=no.json", "data.train_file=no.json"),
        ("ray.storage_path=s3://bucket/runs", "object stores do not have"),
    ],
)
def test_impossible_sweep(said, override, why):
    assert why in said(override)


def test_resume_without_a_sweep_to_go_on_with(said):
    assert "has no trials.jsonl" in said("--resume", "ray.run_name=none")


def test_train_refuses_a_sweep_and_says_what_to_do(tmp_path, capsys):
    assert train.main(["-c", "configs/sweep.yaml", f"ray.storage_path={tmp_path}"]) == 2
    assert "Start it with python -m qlora_ray.tune" in capsys.readouterr().err


def test_config_that_a_run_wrote_trains_again(tmp_path):
    from qlora_ray.config import load_config

    (tmp_path / "config.yaml").write_text("sweep: null\n")
    assert load_config(tmp_path / "config.yaml").sweep is None
    assert load_config(find_file("configs/sweep.yaml"), ["sweep=null"]).sweep is None


def test_plan_prints_trials_resources_and_cost_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert tune.main(["--plan", f"ray.storage_path={tmp_path}/runs"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "t0007" in out and "8 (random), each 60 steps at most" in out and "480 if none" in out
    assert "1 x 1 CPU" in out and "tokens" in out and not (tmp_path / "runs").exists()


def test_plan_counts_the_tokens_of_rows_that_hold_whole_pairs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    trials = 'sweep.parameters={"training.learning_rate": {"grid": [0.001, 0.002]}}'
    asked = ["-c", "configs/dpo.yaml", trials, "sweep.search=grid", f"ray.storage_path={tmp_path}/runs"]
    assert tune.main(["--plan", *asked, "ray.num_workers=1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "(2 rows x 249 a step)" in out  # the longest; max_length, 128, is of one answer with its prompt


def test_console_script_knows_the_door(capsys):
    assert cli.main(["tune", "-c", "configs/quickstart.yaml"]) == 2
    assert "sweep: the config has no such section" in capsys.readouterr().err
