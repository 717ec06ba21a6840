"""The data's tokens against the base's rows: what has none is refused, what was never trained is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora_ray.config import Config
from qlora_ray.data.prepare import prepare
from qlora_ray.data.rows import open_rows
from qlora_ray.data.stats import Layout
from qlora_ray.data.vocabulary import token_counts
from qlora_ray.errors import ConfigError
from qlora_ray.planning import tokens
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.tokens import check_vocabulary
from qlora_ray.storage import open_folder
from tests.integration import tiny_models


@pytest.fixture
def base(tmp_path) -> Path:
    """A model of 2,048 rows."""
    return Path(tiny_models.save("llama", tmp_path / "base"))


def add(base: Path, tokens: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(base)


def prepared_rows(base: Path, answer: str, **model):
    rows = base.parent / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"say {i}", "output": answer} for i in range(12)]))
    config: Config = tiny_models.make_config(str(base), model=model, data={"train_file": str(rows)})
    return config, prepare(config, open_folder(str(base.parent / "storage")), how=Layout(packing=True))


def look(base: Path, answer: str, **model) -> list[str]:
    config, prepared = prepared_rows(base, answer, **model)
    return check_vocabulary(config, prepared, exact_facts(config))


def test_token_without_a_row_is_refused_by_name_id_and_number_of_rows(base):
    add(base, tokens=["<tool>", "<never>"])
    with pytest.raises(ConfigError) as refused:
        look(base, "<tool>1")
    said = str(refused.value)
    assert "its embedding has 2,048 rows, and the data has tokens beyond them: '<tool>' (id 2048)." in said
    assert "<never>" not in said and "model.new_tokens" in said
    assert look(base, "1") == []  # the data has none of them
    assert look(base, "<tool>1", new_tokens=["<tool>"]) == []


def test_data_tokens_whose_rows_nothing_has_trained_are_told(base):
    token = AutoTokenizer.from_pretrained(base)("a zebra", add_special_tokens=False)["input_ids"][-1]
    name = AutoTokenizer.from_pretrained(base).convert_ids_to_tokens(token)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = 0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert look(base, "1") == []  # the data has none of them
    (note,) = look(base, "a zebra")
    assert f"{name!r} (12x)" in note and "model.new_tokens" in note


def test_where_nothing_is_to_be_named_no_tokenizer_is_opened_again(base, monkeypatch):
    assert look(base, "1") == []

    def open_tokenizer(_):
        raise AssertionError("a tokenizer was opened")

    monkeypatch.setattr(tokens, "encoder_of", open_tokenizer)
    config, prepared = prepared_rows(base, "1")
    assert check_vocabulary(config, prepared, exact_facts(config)) == []


def test_tokens_are_counted_as_the_rows_have_them(base):
    rows = base.parent / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i}"} for i in range(40)]))
    config = tiny_models.make_config(str(base), data={"train_file": str(rows), "validation_split": 0})
    prepared = prepare(config, open_folder(str(base.parent / "storage")), how=Layout(packing=False))
    ids = torch.tensor(sum(open_rows(prepared.entry, "train").gather(np.arange(40))["input_ids"].to_pylist(), []))
    for _ in range(2):  # counted, and found counted
        assert token_counts(prepared.train).tolist() == torch.bincount(ids).tolist()
