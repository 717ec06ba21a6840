"""New tokens and modules that are trained whole: through sharding, checkpoint, adapter, plain PEFT and merging."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_ray import evaluate, export, generate
from qlora_ray.data.prepare import make_recipe
from qlora_ray.data.work import encoder_of
from qlora_ray.errors import ConfigError
from qlora_ray.inference.merge import merge
from qlora_ray.model.base import load_base
from qlora_ray.model.record import open_adapter
from qlora_ray.planning.early import exact_facts
from qlora_ray.storage import open_folder
from qlora_ray.worker.export import write_adapter
from tests.integration import adapters, door, engines, many_runs, tiny_models

CPU = torch.device("cpu")
TOKENS = ["<tool>", "</tool>"]
SPARE, FULL = 2064, 2048  # rows of the embedding: the tokenizer has 2,048 tokens


def base_of(folder: Path, family: str, is_tied: bool, num_rows: int) -> str:
    return tiny_models.save(family, folder, tie_word_embeddings=is_tied, vocab_size=num_rows)


def with_new_tokens(seed: int = 0, ids: Iterable[int] = (FULL, FULL + 1)) -> dict[str, torch.Tensor]:
    """A batch in which two new tokens are read, the second of them is answered."""
    rows, (read, answered) = tiny_models.batch(seed), ids
    rows["input_ids"][:, 5], rows["input_ids"][:, 14] = read, answered
    rows["labels"][:, 14] = answered
    return rows


def logits(model: torch.nn.Module, ids: Iterable[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=with_new_tokens(ids=ids)["input_ids"], use_cache=False).logits.float()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    ("family", "is_tied", "num_rows"),
    [
        ("llama", False, FULL),
        ("llama", True, FULL),
        ("llama", False, SPARE),
        ("gemma2", True, SPARE),
        ("qwen2", True, FULL),
    ],
)
def test_rows_of_new_tokens_are_trained_and_the_adapter_is_the_live_models_in_plain_peft(
    family, is_tied, num_rows, stage, tmp_path, process_group
):
    base = base_of(tmp_path / "base", family, is_tied, num_rows)
    config = tiny_models.make_config(base, model={"new_tokens": TOKENS}, deepspeed={"zero_stage": stage})
    facts = exact_facts(config)
    ids = list(facts.new_tokens)  # transformers' Qwen2 tokenizer adds one of its own before them
    assert ids == ([FULL + 1, FULL + 2] if family == "qwen2" else [FULL, FULL + 1])
    assert facts.num_embedding_rows == max(num_rows, ids[1] + 1)
    engine = engines.build(config, tmp_path)
    before = {name: rows for name, rows in engine.weights().items() if "trainable_tokens" in name}
    assert len(before) == (1 if is_tied else 2)
    assert sum(value.numel() for value in engine.weights().values()) == facts.num_trainable_parameters
    losses = engines.train(engine, range(8), batch=partial(with_new_tokens, ids=ids))
    assert losses[-1] < losses[0] - 0.05
    for name, rows in before.items():
        assert bool((engine.weights()[name] != rows).any(1).all())

    adapter = open_folder(str(tmp_path / "adapter"))
    write_adapter(adapter, engine.module, engine.weights(), encoder_of(make_recipe(config)).tokenizer)
    plain = load_base(config.model, config.quantization, "float32", CPU)
    frozen = plain.get_input_embeddings().weight.clone()
    if num_rows == FULL:
        plain.resize_token_embeddings(ids[1] + 1)
    loaded = PeftModel.from_pretrained(plain, adapter.path)
    assert tiny_models.difference(logits(engine.module, ids), logits(loaded, ids)) < 1e-5
    assert torch.equal(loaded.get_input_embeddings().weight[:FULL], frozen[:FULL])


def test_a_row_begins_as_the_mean_of_what_its_text_was(tmp_path, process_group):
    base = base_of(tmp_path / "base", "llama", False, FULL)
    config = tiny_models.make_config(base, model={"new_tokens": TOKENS})
    engine, tokenizer = engines.build(config, tmp_path), AutoTokenizer.from_pretrained(base)
    embedding = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_input_embeddings().weight
    pieces = tokenizer("<tool>", add_special_tokens=False)["input_ids"]
    (rows,) = [v for n, v in engine.weights().items() if "embed_tokens.token_adapter" in n]
    assert len(pieces) > 1
    assert torch.allclose(rows[0], embedding[pieces].mean(0), atol=1e-6)


def test_every_stage_learns_the_same_rows(tmp_path, process_group):
    base = base_of(tmp_path / "base", "llama", False, FULL)
    losses = []
    for stage in (0, 2, 3):
        config = tiny_models.make_config(base, model={"new_tokens": TOKENS}, deepspeed={"zero_stage": stage})
        losses.append(engines.train(engines.build(config, tmp_path / str(stage)), range(4), batch=with_new_tokens))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("modules", [["norm"], ["lm_head"], ["model.norm", "lm_head"]])
def test_modules_trained_whole_are_the_live_models_in_plain_peft(modules, tmp_path, process_group):
    base = base_of(tmp_path / "base", "llama", False, FULL)
    config = tiny_models.make_config(base, model={"modules_to_save": modules}, deepspeed={"zero_stage": 3})
    facts, engine = exact_facts(config), engines.build(config, tmp_path)
    before = {name: value for name, value in engine.weights().items() if "modules_to_save" in name}
    assert len(before) == sum(facts.whole_modules.values())
    assert sum(value.numel() for value in engine.weights().values()) == facts.num_trainable_parameters
    losses = engines.train(engine, range(8))
    assert losses[-1] < losses[0] - 0.05
    assert all(bool((engine.weights()[name] != value).any()) for name, value in before.items())
    adapter = open_folder(str(tmp_path / "adapter"))
    write_adapter(adapter, engine.module, engine.weights(), AutoTokenizer.from_pretrained(base))
    plain = PeftModel.from_pretrained(load_base(config.model, config.quantization, "float32", CPU), adapter.path)
    assert tiny_models.difference(tiny_models.logits(engine.module), tiny_models.logits(plain)) < 1e-5


def test_modules_trained_whole_are_merged(tmp_path):
    base = tiny_models.save("llama", tmp_path / "base")
    folder = adapters.trained(tmp_path / "run", base, steps=3, modules_to_save=["norm", "lm_head"])
    adapter = open_adapter(str(folder))
    merge(adapter, tmp_path / "merged", "training", "float32", CPU)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = PeftModel.from_pretrained(load_base(adapter.model, adapter.quantization, "float32", CPU), str(folder))
    assert tiny_models.difference(tiny_models.logits(merged), tiny_models.logits(plain)) < 1e-5
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not torch.equal(merged.model.norm.weight, original.model.norm.weight)


@pytest.mark.parametrize(
    ("family", "model", "said"),
    [
        ("llama", {"modules_to_save": ["nrm"]}, "matches no module of the LlamaForCausalLM. Nearest: norm"),
        ("llama", {"modules_to_save": ["q_proj"]}, "is stored in 4 bits and cannot be trained whole"),
        ("llama", {"modules_to_save": ["mlp"]}, "is stored in 4 bits and cannot be trained whole"),
        ("gemma2", {"modules_to_save": ["lm_head"]}, "is one matrix with another layer"),
        ("llama", {"modules_to_save": ["lm_head"], "new_tokens": ["<a>"]}, "lm_head is trained whole"),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "new_tokens": ["<a>"]}, "lm_head gets a LoRA"),
        ("phi", {"new_tokens": ["<a>"]}, "has a bias"),
    ],
)
def test_what_cannot_be_trained_so_is_refused_by_name(family, model, said, tmp_path):
    if family == "phi":
        tiny_models.FAMILIES.setdefault("phi", {})
    folder = tiny_models.save(family, tmp_path)
    with pytest.raises(ConfigError) as refused:
        exact_facts(tiny_models.make_config(folder, model=model))
    assert said in str(refused.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """The same run of one and of two workers on records with new tokens, the latter whole and gone on with."""
    folder = tmp_path_factory.mktemp("runs")
    lines = [{"instruction": f"count {i}", "output": f"<tool>{i}</tool>"} for i in range(24)]
    (folder / "rows.json").write_text(json.dumps(lines))

    def config_of(name: str, workers: int) -> dict:
        return {
            "data": {"train_file": f"{folder}/rows.json"}, "model": {"new_tokens": TOKENS},
            "training": {"max_steps": 6, "batch_size": 2, "global_batch_size": 4, "max_length": 64,
                         "learning_rate": 3e-3},
            "checkpoint": {"every_steps": 2, "keep": 3}, "evaluation": {"num_prompts": 2, "max_new_tokens": 8},
            "ray": {"num_workers": workers, "storage_path": str(folder), "run_name": name},
        }  # fmt: skip

    many_runs.train([config_of("one", 1), config_of("two", 2), config_of("two", 2)])
    return [folder / "one", folder / "two", many_runs.whole(folder / "two")]


def weights_of(run: Path) -> str:
    return door.sha256(run / "adapter" / "adapter_model.safetensors")


def test_runs_of_one_and_two_workers_and_a_resumed_one_have_the_same_bits(runs):
    assert len({weights_of(run) for run in runs}) == 1
    config = json.loads((runs[0] / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"]
    rows = max(max(ids) + 1 for ids in config["trainable_token_indices"].values())
    card = (runs[0] / "adapter" / "README.md").read_text()
    assert "`<tool>`, `</tool>`" in card and f"resize_token_embeddings({rows})" in card


def test_doors_take_a_run_with_new_tokens_as_any_other(runs, tmp_path, capsys):
    adapter = str(runs[0] / "adapter")
    merged = tmp_path / "merged"
    assert generate.main(["--adapter", adapter, "--prompt", "count 3", "max_new_tokens=8"]) == 0
    assert evaluate.main(["--adapter", adapter]) == 0
    to_merged = ["--to", "merged", "--output", str(merged), "--verify", "--dtype", "float32"]
    assert export.main(["--adapter", adapter, *to_merged]) == 0
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer("<tool>", add_special_tokens=False)["input_ids"] == [len(tokenizer) - 2]
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
