"""Models that transformers does not have: one in a folder with its own code, one that a function makes."""

import json
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.integration import tiny_models

CODE = """from transformers import LlamaConfig, LlamaForCausalLM

from .own_config import OwnConfig


class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""
CONFIG = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MAP = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}


def save_with_code(folder: Path, **config) -> str:
    """A random Llama under another name, with the code that builds it; returns the folder."""
    tiny_models.save("llama", folder)
    (folder / "modeling_own.py").write_text(CODE)
    (folder / "own_config.py").write_text(CONFIG)
    change(folder, model_type="own", auto_map=MAP, **config)
    return str(folder)


def save_without_code(folder: Path) -> str:
    """The same for a function to build: `make`."""
    tiny_models.save("llama", folder)
    change(folder, model_type="unheard_of", architectures=["Unheard"])
    return str(folder)


def change(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Unheard(LlamaForCausalLM):
    """Stands for an architecture of one's own."""


def make(config: PreTrainedConfig) -> PreTrainedModel:
    """What model.factory names in the tests."""
    values = config.to_dict()
    return Unheard(LlamaConfig(**{name: value for name, value in values.items() if name != "model_type"}))


def make_nothing(config: PreTrainedConfig) -> None:
    """A function that does not keep the contract."""
