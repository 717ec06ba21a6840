"""Bases whose weights are pickled: converted once, bit for bit, and used through every door; a pickle is never run."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_ray import evaluate, export, generate, plan, train
from qlora_ray.cluster import node_facts
from qlora_ray.config import ModelConfig
from qlora_ray.model import hub as hub_folders
from qlora_ray.model.base import count_bytes, load_base
from qlora_ray.model.facts import read_facts, weight_files
from qlora_ray.model.pickled import converted_folder
from qlora_ray.model.record import FILE
from qlora_ray.planning.early import exact_facts
from tests.integration import adapters, door, tiny_models

CPU = torch.device("cpu")


class Harm:
    """What a hostile file asks the unpickler to do."""

    def __init__(self, witness: Path):
        self._witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self._witness}",)


def pickle_weights(folder: Path, num_files: int = 1, is_old: bool = False, **more) -> dict[str, torch.Tensor]:
    """Replace a folder's safetensors by what torch.save writes, in the format before torch 1.6 if old."""
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict() | more
    (folder / "model.safetensors").unlink()
    names, files = list(weights), {}
    for number in range(num_files):
        file = "pytorch_model.bin" if num_files == 1 else f"pytorch_model-{number + 1:05}-of-{num_files:05}.bin"
        part = {name: weights[name] for name in names[number::num_files]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not is_old)
        files |= dict.fromkeys(part, file)
    if num_files > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weights


def load(folder: Path | str, **sections):
    config = tiny_models.make_config(str(folder), **sections)
    return load_base(config.model, config.quantization, "float32", CPU)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("is_old", [True, False])
def test_converted_base_computes_what_the_pickled_one_did(assets, tmp_path, tied, num_files, is_old):
    folder = Path(tiny_models.save("llama", tmp_path / "base", tie_word_embeddings=tied))
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_parameters = read_facts(str(folder)).num_parameters
    weights = pickle_weights(folder, num_files, is_old)
    ours = load(folder, quantization={"type": "none"})
    assert torch.equal(tiny_models.logits(ours), tiny_models.logits(exact))
    stored = {name: value for file in weight_files(folder, "") for name, value in load_file(file).items()}
    assert stored.keys() == weights.keys() and all(torch.equal(stored[name], weights[name]) for name in weights)
    facts, found = exact_facts(tiny_models.make_config(str(folder))), count_bytes(load(folder))
    assert (facts.num_linear_parameters, facts.num_parameters) == (found.four_bit_parameters, found.parameters)
    assert read_facts(str(folder)).num_parameters == num_parameters
    (copy,) = [path for path in assets.iterdir() if path.is_dir()]
    assert {path.name for path in copy.glob("*.bin*")} == set() and (copy / "config.json").is_symlink()


def test_gpt2_of_2020_with_masks_among_its_weights_is_loaded(assets, tmp_path):
    folder = Path(tiny_models.save("gpt2", tmp_path / "base"))
    (folder / "tokenizer_config.json").unlink()
    exact = AutoModelForCausalLM.from_pretrained(folder)
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8)}
    pickle_weights(folder, is_old=True, **masks)
    assert torch.equal(tiny_models.logits(load(folder, quantization={"type": "none"})), tiny_models.logits(exact))


def test_conversion_is_told_in_one_line_and_done_once(assets, tmp_path, caplog):
    folder = Path(tiny_models.save("llama", tmp_path / "base"))
    pickle_weights(folder)
    first = weight_files(folder, f"model.base_model={folder}")
    second = weight_files(folder, f"model.base_model={folder}")
    (told,) = [record.getMessage() for record in caplog.records if record.name == "qlora_ray.model.pickled"]
    assert told.startswith(f"model.base_model={folder}: its weights are pickled") and str(assets) in told
    assert first == second and "\n" not in told
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes() + b"")  # another time
    assert weight_files(folder, "") != first


def test_pickle_that_asks_for_more_than_weights_is_refused_by_name_and_not_run(assets, refused, tmp_path):
    for number, is_old in enumerate((True, False)):
        folder = Path(tiny_models.save("llama", tmp_path / f"base{number}"))
        pickle_weights(folder, is_old=is_old, harm=Harm(tmp_path / "witness"))
        for opened in (train, plan):
            message = refused(opened, f"model.base_model={folder}")
            assert (
                "pytorch_model.bin cannot be read as weights alone (Trying to load unsupported GLOBAL posix" in message
            )
    assert not (tmp_path / "witness").exists() and not [path for path in assets.glob("*") if path.is_dir()]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {"a": torch.zeros(2)}}, "holds 'state_dict' (dict), which is no plain tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "holds 'a' (Tensor), which is no plain tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "holds 'a' (torch.complex64), which is no plain tensor"),
        ([torch.zeros(2)], "holds a list, not tensors by name"),
        (b"no pickle", "cannot be read as weights alone"),
        (b"", "cannot be read as weights alone"),
    ],
)
def test_pickled_file_that_holds_something_else_is_refused_by_name(assets, refused, tmp_path, content, said):
    folder = Path(tiny_models.save("llama", tmp_path / "base"))
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert f"pytorch_model.bin {said}" in refused(plan, f"model.base_model={folder}")


def test_shard_that_is_missing_and_files_of_other_names_are_refused(assets, refused, tmp_path):
    folder = Path(tiny_models.save("llama", tmp_path / "base"))
    pickle_weights(folder, num_files=2)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    content = shard.read_bytes()
    shard.unlink()
    assert f"{shard.name} is missing from the folder" in refused(plan, f"model.base_model={folder}")
    (folder / "pytorch_model.bin.index.json").write_text("[]")
    assert "pytorch_model.bin.index.json is damaged" in refused(plan, f"model.base_model={folder}")
    (folder / "pytorch_model.bin.index.json").unlink()
    shard.with_name("consolidated.00.pth").write_bytes(content)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    assert "only consolidated.00.pth" in refused(plan, f"model.base_model={folder}")


def test_safetensors_beside_a_pickle_are_what_is_read(assets, tmp_path):
    folder = Path(tiny_models.save("llama", tmp_path / "base"))
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    load(folder)
    assert not assets.exists()


def convert(folder: Path, assets: str, start, told) -> None:
    from huggingface_hub import constants

    from qlora_ray.model import pickled

    constants.HF_ASSETS_CACHE = assets
    pickled.logger.warning = lambda *_: told.put(1)  # type: ignore[method-assign]
    start.wait()
    converted_folder(folder, "")


def test_of_processes_that_want_the_same_base_one_converts_and_what_a_killed_one_left_is_removed(assets, tmp_path):
    folder = Path(tiny_models.save("llama", tmp_path / "base"))
    pickle_weights(folder)
    known = converted_folder(folder, "")
    content = (known / "model.safetensors").read_bytes()
    known.rename(left := known.with_name(f"{known.name}.0123.tmp"))
    context = multiprocessing.get_context("spawn")
    start, told = context.Barrier(3), context.Queue()
    cache = str(assets.parents[1])
    processes = [context.Process(target=convert, args=(folder, cache, start, told)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert told.get(timeout=60) and told.empty()
    assert (known / "model.safetensors").read_bytes() == content and not left.exists()
    assert not list(assets.glob("*.tmp"))


def test_cache_that_cannot_be_written_to_is_refused_with_the_way_out(refused, tmp_path, monkeypatch):
    folder = Path(tiny_models.save("llama", tmp_path / "base"))
    pickle_weights(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "file"))
    message = refused(plan, f"model.base_model={folder}")
    assert "its pickled weights cannot be converted" in message and "set HF_ASSETS_CACHE" in message


def test_pickled_files_are_fetched_from_the_hub_only_where_it_has_no_others(tmp_path, monkeypatch):
    import huggingface_hub

    asked: list[list[str]] = []

    def serves(*names: str):
        def snapshot_download(base, revision=None, allow_patterns=(), **_):
            asked.append(list(allow_patterns))
            for name in names:
                if any(Path(name).match(pattern) for pattern in allow_patterns):
                    (tmp_path / name).write_bytes(b"")
            return str(tmp_path)

        return snapshot_download

    monkeypatch.setattr(huggingface_hub, "snapshot_download", serves("model.safetensors", "pytorch_model.bin"))
    hub_folders.local_folder("someone/both", None)
    assert len(asked) == 1 and not (tmp_path / "pytorch_model.bin").exists()
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", serves("pytorch_model.bin", "rust_model.bin"))
    hub_folders.local_folder("someone/pickled", None)
    assert (tmp_path / "pytorch_model.bin").exists() and not (tmp_path / "rust_model.bin").exists()


def test_doctor_tells_that_pickled_weights_will_be_converted_and_converts_nothing(assets, tmp_path):
    folder = Path(tiny_models.save("llama", tmp_path / "base"))
    pickle_weights(folder)
    model = ModelConfig(base_model=str(folder))
    found = node_facts._base(node_facts.Question(model, None, ".probe", "", ask_hub=False))
    assert found == {"here": True, "why": f"{folder}; its pickled weights are converted once, when they are first read"}
    assert not assets.exists()


def test_adapter_of_a_pickled_base_is_answered_with_evaluated_and_merged(assets, tmp_path, capsys):
    folder = Path(tiny_models.save("gpt2", tmp_path / "base"))
    pickle_weights(folder)
    adapter = adapters.trained(tmp_path / "run", str(folder), steps=1)
    base = json.loads((adapter / FILE).read_text())["base"]
    assert base["base_model"] == str(folder.resolve())
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    assert generate.main(["--adapter", str(adapter), "--prompt", "x", "max_new_tokens=1"]) == 0
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"instruction": "Say yes.", "output": "yes"}) + "\n")
    assert evaluate.main(["--adapter", str(adapter), "--file", str(records)]) == 0
    shutil.rmtree(assets)  # converted anew where it is gone
    merged = tmp_path / "merged"
    assert export.main(["--adapter", str(adapter), "--to", "merged", "--output", str(merged)]) == 0
    AutoModelForCausalLM.from_pretrained(merged)
    assert not [path for path in merged.iterdir() if path.suffix == ".bin" or path.is_symlink()]


def test_hub_base_with_vocabulary_merges_and_pickled_weights_alone_is_trained_on(hub, tmp_path, monkeypatch):
    snapshot = hub("someone/of-2020", tiny_models.save("gpt2", tmp_path / "made"))
    pickle_weights(snapshot, is_old=True)
    tokenizer = json.loads((snapshot / "tokenizer.json").read_text())["model"]
    (snapshot / "vocab.json").write_text(json.dumps(tokenizer["vocab"] | {"<|endoftext|>": 0}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    (snapshot / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (snapshot / name).unlink(missing_ok=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(snapshot.parents[2]))
    ended = door.run(
        "model.base_model=someone/of-2020", "training.max_steps=1", "training.max_length=128",
        "evaluation.num_prompts=0", f"ray.storage_path={tmp_path}", "ray.run_name=r",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "its weights are pickled" in ended.stderr
    record = json.loads((tmp_path / "r" / "adapter" / FILE).read_text())["base"]
    assert (record["base_model"], record["commit"]) == ("someone/of-2020", "a" * 40)
