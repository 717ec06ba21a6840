"""What a user may write in YAML and overrides, and what they are told when it cannot be."""

import json
from pathlib import Path

import pydantic
import pytest

from qlora_ray import cli
from qlora_ray.config import Config, bundled_root, find_file, load_config, make_config
from qlora_ray.errors import ConfigError

CONFIGS = sorted((bundled_root() / "configs").glob("*.yaml"))


@pytest.fixture
def written(tmp_path):
    """Writes a YAML text (or bytes) and returns its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def message(path, *overrides) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(path, list(overrides))
    return str(refused.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    import yaml

    asked = yaml.safe_load(path.read_text())
    assert load_config(path).model_dump(mode="json", exclude_unset=True) == asked


def test_template_holds_the_users_own_names_and_values():
    config = load_config(find_file("configs/train_config.yaml"))
    assert (config.model.base_model, config.model.lora_r) == ("microsoft/DialoGPT-medium", 16)
    assert (config.model.lora_alpha, config.model.lora_dropout) == (32, 0.1)
    assert (config.training.num_epochs, config.training.batch_size) == (3, 4)
    assert (config.training.learning_rate, config.training.max_length) == (2e-4, 512)
    assert (config.data.train_file, config.data.validation_split) == ("data/sample_data.json", 0.1)


@pytest.mark.parametrize("content", ["", "# nothing\n", "training:\n  # all commented out\n"])
def test_empty_file_or_section_gives_the_defaults(written, content):
    assert load_config(written(content)) == Config()


def test_empty_section_takes_overrides(written):
    assert load_config(written("training:\n"), ["training.seed=5"]).training.seed == 5


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("training.lerning_rate=1", "training.learning_rate"),
        ("training.lora_r=8", "model.lora_r"),
        ("learning_rate=1e-4", "training.learning_rate"),
        ("trainig.seed=1", "training"),
        ("ray.num_worker=2", "ray.num_workers"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known(written, unknown, nearest):
    said = message(written(""), unknown)
    assert said.startswith(f"{unknown.split('=')[0].split('.')[0]}")
    assert f"unknown key. Did you mean {nearest}?" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("training.batch_size=0", "greater than or equal to 1"),
        ("training.batch_size=many", "valid integer"),
        ("training.batch_size=2.5", "valid integer"),
        ("training.learning_rate=-1", "greater than 0"),
        ("training.learning_rate=.nan", "finite"),
        ("training.learning_rate=.inf", "finite"),
        ("training.lr_schedule=polynomial", "'cosine', 'linear' or 'constant'"),
        ("model.lora_dropout=1", "less than 1"),
        ("data.validation_split=1.5", "less than 1"),
        ("deepspeed.zero_stage=4", "'auto', 0, 1, 2 or 3"),
        ("ray.num_workers=0", "at least 1"),
        ("training.seed=4294967296", "less than 4294967296"),
    ],
)
def test_wrong_type_or_range_names_key_value_and_rule(written, override, rule):
    said = message(written(""), override)
    key, value = override.split("=")
    assert said.startswith(f"{key}={value.lstrip('.')}:"), said
    assert rule in said and len(said.splitlines()) == 1


def test_negative_resources_are_refused(written):
    assert "ray.resources_per_worker.CPU=-1" in message(written(""), "ray.resources_per_worker.CPU=-1")


@pytest.mark.parametrize("section", ["model", "training", "deepspeed", "ray"])
def test_a_value_where_a_section_belongs_is_refused_by_name(written, section):
    assert message(written(f"{section}: 3\n")).startswith(f"{section}=3:")


def test_number_that_yaml_reads_as_text_becomes_a_float(written):
    config = load_config(written("training:\n  learning_rate: 2e-4\n"))
    assert isinstance(config.training.learning_rate, float) and config.training.learning_rate == 0.0002


def test_overrides_win_over_the_file_and_later_ones_over_earlier(written):
    path = written("training:\n  batch_size: 2\n  seed: 1\n")
    config = load_config(
        path, ["training.batch_size=3", "training.batch_size=5", "model.target_modules=[q_proj, v_proj]"]
    )
    assert (config.training.batch_size, config.training.seed) == (5, 1)
    assert config.model.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("override", ["training.seed", "=3", "seed 3"])
def test_override_without_key_or_value_says_how_it_is_written(written, override):
    assert "section.key=value" in message(written(""), override)


def test_override_below_a_value_is_refused(written):
    assert "a value, not a section" in message(written("training:\n  seed: 3\n"), "training.seed.x=1")


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", ".hidden", "", "a" * 65, "a b"])
def test_run_name_that_is_not_a_plain_name_is_refused(written, name):
    assert message(written(""), f"ray.run_name={json.dumps(name)}").startswith("ray.run_name=")


def test_plain_run_name_is_taken(written):
    assert load_config(written(""), ["ray.run_name=Run_1.b-2"]).ray.run_name == "Run_1.b-2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("training: [1,\n", "not YAML"),
        ("a:\n\tb: 1\n", "line 2, column 1"),
        ("- 1\n- 2\n", "found a list"),
        ("word", "found a str"),
        ("training:\n  # 中文\n".encode("gb18030"), "not UTF-8 text (byte 14)"),
    ],
)
def test_file_that_is_not_yaml_sections_is_refused_with_the_place(written, content, said):
    path = written(content)
    assert message(path).startswith(f"-c {path}:") and said in message(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    assert message(tmp_path / "no.yaml") == f"-c {tmp_path / 'no.yaml'}: no such file."
    assert "directory" in message(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.trust_remote_code=true"], "model.trust_remote_code"),
        (["model.trust_remote_code=true", "model.revision=main"], "model.trust_remote_code"),
        (["deepspeed.offload_params=disk"], "deepspeed.offload_params=disk"),
        (["model.lora_variant=pissa"], "model.lora_variant=pissa"),
        (["model.lora_variant=loftq", "quantization.type=none"], "model.lora_variant=loftq"),
    ],
)
def test_fields_that_contradict_are_refused_by_name(written, overrides, key):
    said = message(written(""), *overrides)
    assert said.startswith(key) and not said.startswith("Value error")


def test_pissa_is_not_offered_and_who_asks_for_it_is_told_what_to_use(written):
    assert "loftq" in message(written(""), "model.lora_variant=pissa")
    assert "pissa" not in json.dumps(Config.model_json_schema()["$defs"]["ModelConfig"]["properties"]["lora_variant"])


def test_folder_of_a_base_is_found_from_every_folder_and_a_hub_id_stays(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    named = [make_config({"model": {"base_model": name}}).model.base_model for name in ("base", "./base", "a/b")]
    assert named == [str(tmp_path / "base"), str(tmp_path / "base"), "a/b"]


def test_config_is_frozen():
    with pytest.raises(pydantic.ValidationError):
        Config().training.batch_size = 8


def test_schema_prints_every_key_with_its_meaning(capsys):
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    sections = [section for name, section in schema["$defs"].items() if name.endswith("Config")]
    assert len(sections) == len(Config.model_fields)
    undocumented = [
        key for section in sections for key, field in section["properties"].items() if "description" not in field
    ]
    assert undocumented == []


def test_number_of_workers_is_one_or_a_range():
    assert (Config().ray.min_workers, Config().ray.max_workers) == (1, 1)
    elastic = Config.model_validate({"ray": {"num_workers": [1, 4]}}).ray
    assert (elastic.min_workers, elastic.max_workers) == (1, 4)
    for wrong in ([4, 1], [0, 2], [1], [1, 2, 3], 0):
        with pytest.raises(pydantic.ValidationError):
            Config.model_validate({"ray": {"num_workers": wrong}})
