"""What is planned and refused where the layers' weights lie on the host or on a disk."""

import dataclasses

import pytest

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model import homes, host
from qlora_ray.planning import memory, offload, table
from qlora_ray.planning.early import check_disk, check_room, exact_facts, refuse_early
from qlora_ray.planning.offload import Passing
from tests.integration import tiny_models
from tests.unit.test_plan import FACTS, GPUS, plan, refusal

NVME = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/disk", "buffer_count": 5}}}


@pytest.mark.parametrize(
    "asked, said",
    [
        (
            {"zero_stage": 2, "offload_params": "cpu"},
            "offload_params=cpu: needs zero_stage 3, the stage is 2.",
        ),
        ({"offload_params": "nvme"}, "offload_params=nvme: deepspeed.nvme_path is not set."),
        (
            {"offload_params": "cpu", "nvme_path": "/disk"},
            "offload_params=cpu: deepspeed.nvme_path is /disk.",
        ),
        ({"nvme_path": "/disk"}, "nvme_path=/disk: needs deepspeed.offload_params=nvme."),
        (
            {"offload_params": "cpu", "share_base": "world"},
            "share_base=world: with deepspeed.offload_params=",
        ),
    ],
)
def test_settings_that_contradict_are_refused_by_name(asked, said):
    assert refusal(deepspeed=asked).startswith(f"deepspeed.{said}")
    with pytest.raises(ConfigError):
        refuse_early(Config.model_validate({"deepspeed": asked}), None)


def test_variants_that_begin_from_whole_weights_are_refused():
    assert "begins from whole weights" in refusal(deepspeed={"offload_params": "cpu"}, model={"lora_variant": "dora"})


def test_a_deepspeed_json_that_asks_for_nvme_is_honoured_and_told_what_means_nothing():
    made = plan(GPUS, NVME)
    assert made.passing is not None and made.passing.disk_bytes > 0
    assert "offload_param" not in made.deepspeed["zero_optimization"]
    assert any("offload_param.buffer_count in the DeepSpeed JSON: not used" in note for note in made.notes)
    taken = offload.taken_from_json(Config(), NVME).deepspeed
    assert (taken.offload_params, taken.nvme_path) == ("nvme", "/disk")
    said = refusal(deepspeed_json=NVME, deepspeed={"offload_params": "cpu"})
    assert said.startswith("zero_optimization.offload_param.device=nvme in the DeepSpeed JSON contradicts")
    optimizer = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    assert "the state of an adapter's optimizer is small" in refusal(deepspeed_json=optimizer)


def test_plan_counts_what_passes_and_how_many_layers_stay():
    away = {"deepspeed": {"offload_params": "cpu"}}
    made, whole = plan(GPUS, **away), plan(GPUS)
    passing = made.passing
    packed = FACTS.num_packed_parameters * memory.BYTES_PER_WEIGHT[True]
    assert passing is not None and passing.host_bytes == pytest.approx(packed)
    assert passing.moved_bytes == pytest.approx(2 * max(0, FACTS.num_layers - 3) * passing.slab_bytes)
    assert passing.num_resident == 0 and not made.may_hold_weights and whole.passing is None
    roomy = plan(dataclasses.replace(GPUS, gpu_gib=80), **away).passing
    assert roomy is not None and (roomy.num_resident, roomy.moved_bytes) == (FACTS.num_layers, 0)


def test_a_folder_that_cannot_take_the_weights_is_refused_before_ray(tmp_path):
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        asked = {"deepspeed": {"offload_params": "nvme", "nvme_path": str(tmp_path / name)}}
        with pytest.raises(ConfigError, match=f"deepspeed.nvme_path=.*{name}: no such folder"):
            check_disk(Config.model_validate(asked))
    check_disk(Config.model_validate({"deepspeed": {"offload_params": "nvme", "nvme_path": str(tmp_path)}}))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"offload_params": "cpu"}, "offload_params=cpu: 2 workers keep 6.00 GiB in host memory, and 5.00 are free. "
         "Use fewer workers (ray.num_workers), or nvme with deepspeed.nvme_path."),
        ({"offload_params": "nvme", "nvme_path": "/"}, "nvme_path=/: 2 workers keep 80.00 GiB there, and 79.00 are "
         "free. Free space, or name a folder on a larger local disk."),
    ],
)  # fmt: skip
def test_memory_or_disk_of_this_machine_that_has_no_room_is_refused_with_numbers(asked, said, monkeypatch):
    on_disk = asked["offload_params"] == "nvme"
    taken = Passing(80, 0, 2**30, (1 if on_disk else 3) * 2**30, 40 * 2**30 if on_disk else 0, 0, None)
    config = Config.model_validate({"deepspeed": asked, "ray": {"num_workers": 2}})
    monkeypatch.setattr(host, "available_bytes", lambda: 5 * 2**30)
    monkeypatch.setattr(homes, "disk_free", lambda _: 79 * 2**30)
    with pytest.raises(ConfigError) as refused:
        check_room(config, taken)
    assert str(refused.value) == f"deepspeed.{said}"
    check_room(config.model_copy(update={"ray": config.ray.model_copy(update={"num_workers": 1})}), taken)


def test_table_names_the_cheapest_setting_with_which_a_row_fits(tmp_path):
    base = tiny_models.save("llama", tmp_path, num_hidden_layers=32)
    asked = {"model": {"base_model": base}, "ray": {"num_workers": 2}, "deepspeed": {"share_base": "replicate"}}
    config = Config.model_validate(asked)
    facts = exact_facts(config)
    whole = memory.sizes(config, facts, facts.num_trainable_parameters, 3, "bfloat16")
    forecast = memory.memory_gib(whole, config.training.max_length, memory.all_layers(whole, memory.Keep.HOST))
    peak = max(memory.peak_gib(forecast), forecast["while_loading"])
    tight = (peak - 1e-5) / memory.SHARE_OF_MEMORY
    assert "one row fits with deepspeed.share_base=world" in table.answer(config, tight, "H100")
    assert "one row fits" not in table.answer(config, 1.01 * peak / memory.SHARE_OF_MEMORY, "H100")
