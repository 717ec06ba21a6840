"""Under ZeRO-3 each worker reads, packs and keeps its share of the base: the bits of today's whole, for less."""

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_ray.config import QuantizationConfig, base_model_path
from qlora_ray.model.base import load_base
from qlora_ray.model.homes import scales_of
from qlora_ray.model.load import load_shares
from qlora_ray.model.record import base_tensors
from qlora_ray.model.shares import Share
from qlora_ray.planning import memory
from qlora_ray.planning.early import exact_facts
from tests.integration import ranks, tiny_models
from tests.integration.ranks import Job

EMBEDDED = base_model_path("embedded")
LAYERS = {"num_hidden_layers": 1}  # the fewer, the faster


def save(folder: Path, family: str, dtype: torch.dtype, **more) -> str:
    """A random base in files of at most 200 kB."""
    made = tiny_models.save(family, folder / "made", **more)
    AutoModelForCausalLM.from_pretrained(made).to(dtype).save_pretrained(folder / family, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(made).save_pretrained(folder / family)
    return str(folder / family)


def quantized(**how) -> dict:
    return {"quantization": how}


def with_head(folder: Path, is_same: bool) -> str:
    """A base with a tied output layer, which its file holds once more."""
    base = tiny_models.save("llama", folder, tie_word_embeddings=True, **LAYERS)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (not is_same)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return base


def check_same(size: int, folder: Path, *jobs: Job) -> list[list[ranks.Held]]:
    """Each job ends with the same shares, scales, losses and adapter whether the base is loaded in shares or whole."""
    both = [Job(**{**vars(job), "is_loaded_whole": whole}) for job in jobs for whole in (False, True)]
    left = ranks.run(size, folder, *both)
    for ours, exact in zip(left[::2], left[1::2], strict=True):
        for one, other in zip(ours, exact, strict=True):
            assert one.error == other.error == "" and one.bytes_read > 0 and one.shares
            assert (one.shares, one.scales, one.persistent) == (other.shares, other.scales, other.persistent)
            assert (one.losses, one.adapter) == (other.losses, other.adapter)
    return left[::2]


@pytest.mark.bites("worker.deepspeed_patches.shares.BORN_IN_SHARES")
def test_shares_of_two_workers_are_those_of_the_whole_for_all_kinds_of_files(tmp_path):
    check_same(
        2, tmp_path / "run",
        Job(EMBEDDED),
        Job(save(tmp_path / "bf16", "llama", torch.bfloat16, **LAYERS), quantized(compute_dtype="bfloat16")),
        Job(save(tmp_path / "fp16", "qwen3", torch.float16, **LAYERS), quantized(double_quant=False)),
        Job(save(tmp_path / "fp32", "gpt2", torch.float32), quantized(type="fp4")),
        Job(with_head(tmp_path / "same", is_same=True)),
        Job(with_head(tmp_path / "other", is_same=False)),
        Job(EMBEDDED, quantized(type="none")),
    )  # fmt: skip


def test_merged_experts_and_shares_that_begin_inside_a_block_are_those_of_the_whole(tmp_path):
    mixtral = save(tmp_path / "a", "mixtral", torch.bfloat16, **LAYERS)
    others = [Job(save(tmp_path / one, one, torch.float32, **LAYERS)) for one in ("gpt_oss", "falcon")]
    left = check_same(3, tmp_path / "run", Job(mixtral), *others)
    for held in (left[0][0], left[1][0]):
        assert any("experts" in name for name in held.scales)
    stored = sum(entry.size for entry in base_tensors(mixtral, "").entries.values())
    # Its third of each tensor, at both ends up to a block of 64 values more; the first reads two weights once more.
    borders = 2 * 64 * 2 * len(base_tensors(mixtral, "").entries)
    assert all(held.bytes_read <= stored / 3 + borders for held in left[0][1:])


def test_folders_in_4_bits_are_shared_as_they_are_stored(tmp_path):
    folders = []
    for family, settings in (("llama", {"llm_int8_skip_modules": ["lm_head", "q_proj"]}), ("gpt2", {})):
        made = tiny_models.save(family, tmp_path / f"{family}-made")
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **settings
        )
        folder = str(tmp_path / family)
        AutoModelForCausalLM.from_pretrained(made, quantization_config=how).save_pretrained(
            folder, max_shard_size="100KB"
        )
        AutoTokenizer.from_pretrained(made).save_pretrained(folder)
        folders.append(folder)
    left = check_same(3, tmp_path / "run", *(Job(folder) for folder in folders))
    stored = sum(entry.size for entry in base_tensors(folders[0], "").entries.values())
    assert left[0][2].bytes_read < 0.45 * stored  # its third, and the scales of all


def test_what_an_adapter_reads_or_copies_is_trained_as_ever(tmp_path):
    base = save(tmp_path, "llama", torch.float32, **LAYERS)
    check_same(
        2, tmp_path / "run", Job(base, {"model": {"modules_to_save": ["norm", "lm_head"], "lora_variant": "rslora"}}),
        Job(base, {"model": {"new_tokens": ["<new>", "<newer>"]}}),
    )  # fmt: skip


def test_share_that_is_not_of_the_files_or_was_cast_ends_the_run_on_every_worker(tmp_path):
    plain = tiny_models.save("opt", tmp_path / "base", **LAYERS)  # whose layers are not fused, and so are ZeRO-3's
    left = ranks.run(2, tmp_path / "run", Job(EMBEDDED, fault="flip"), Job(plain, fault="cast"))
    for held in left[0] + left[1]:
        assert "is not what the base's files give. Likely cause: packed 4-bit bytes were cast" in held.error


class OneOf:
    """A worker among others that are not there: it keeps its shares, and knows the scales of its own blocks alone."""

    def __init__(self, rank: int, size: int):
        self.share = Share(rank, size)

    def keep(self, parameter: Any, share: torch.Tensor) -> None:
        parameter.share, parameter.data = share, torch.empty(0, dtype=parameter.dtype)

    def keep_scales(self, state: Any) -> None:
        for one in scales_of(state):
            start, stop = self.share.of(one.absmax.numel())
            one.absmax = one.absmax[start:stop].clone()

    def take_largest(self, values: torch.Tensor) -> None:
        pass

    def is_everywhere(self, answer: bool) -> bool:
        return answer


def peak_bytes(load: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of tensors that there are at most while loading, and those that are left."""
    gc.collect()  # else what was loaded before may be let go of within
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loaded = load()
        gc.collect()  # what is in circles is not left
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    del loaded
    return max(held), held[-1]


@pytest.mark.bites("model.load.OWN_PARAMETERS")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_memory_while_loading_is_the_share_and_less_than_one_layer_more(family, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    base = tiny_models.save(family, tmp_path, **sizes)
    config = tiny_models.make_config(base, ray={"num_workers": 4})
    layer = sum(one.size for name, one in base_tensors(base, "").entries.items() if ".layers.1." in name)
    whole, _ = peak_bytes(lambda: load_base(config.model, QuantizationConfig(), "float32", torch.device("cpu")))
    for rank in range(4):
        peak, held = peak_bytes(
            lambda rank=rank: load_shares(
                config.model, QuantizationConfig(), "float32", torch.device("cpu"), OneOf(rank, 4)
            )
        )
        assert held < peak <= held + layer
        assert held < 0.4 * whole
    facts = exact_facts(config)
    forecast = memory.loading_gib(memory.sizes(config, facts, facts.num_trainable_parameters, 3, "float32"))
    # Packing needs no buffers on a GPU, which the forecast is for.
    largest = 4 * 256 * 2 * 512 if family == "mixtral" else 256 * 512
    values = torch.zeros(largest // 4)
    packing, _ = peak_bytes(lambda: quantize_4bit(values, quant_type="nf4"))
    assert forecast * 2**30 + packing == pytest.approx(peak, rel=0.1)
