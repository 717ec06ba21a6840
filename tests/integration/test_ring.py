"""Weights that pass through slots, from host memory or from a disk, train the adapter of weights that stay."""

import os

import pytest

from qlora_ray.config import base_model_path
from qlora_ray.errors import ConfigError, Stop
from qlora_ray.model import ring
from qlora_ray.model.homes import DiskFile, network_file_system
from qlora_ray.worker import recomputation
from tests.integration import engines, ranks, tiny_models
from tests.integration.ranks import Job

EMBEDDED = base_model_path("embedded")
DEEP = {"num_hidden_layers": 6}  # more layers than slots, and some come again


def adapter(engine) -> str:
    return ranks.digest(*engine.state().weights.values())


def trained(base: str, folder, offload: str = "none", **sections) -> tuple[list[float], str]:
    """Losses and adapter after three steps, with what is in memory or away."""
    path = {"nvme_path": str(folder)} if offload == "nvme" else {}
    config = tiny_models.make_config(base, **sections, deepspeed={"offload_params": offload, **path})
    engine = engines.build(config, folder / offload)
    return engines.train(engine, range(3), fixed=False), adapter(engine)


@pytest.mark.parametrize(
    "family, sections",
    [
        ("llama", {}),
        ("qwen3", {"quantization": {"compute_dtype": "bfloat16", "double_quant": False}}),
        ("llama", {"model": {"modules_to_save": ["norm"], "new_tokens": ["<new>"]}}),
        ("mixtral", {"training": {"recompute": "all"}}),
        ("qwen2_moe", {}),
        ("gpt_neox", {"training": {"recompute": "all"}}),
        ("llama", {"quantization": {"type": "none"}, "training": {"recompute": "all"}}),
    ],
)
def test_adapter_is_the_same_whether_weights_stay_or_pass(family, sections, tmp_path, process_group, monkeypatch):
    monkeypatch.setattr(ring, "SMALLEST", 2**10)  # else nothing of a base this small passes in 16 bits
    base = tiny_models.save(family, tmp_path / "base", **DEEP)
    stays = trained(base, tmp_path, **sections)
    assert trained(base, tmp_path, "cpu", **sections) == stays
    assert trained(base, tmp_path, "nvme", **sections) == stays


@pytest.mark.parametrize("count", [2, 5, 6])
def test_layers_that_stay_on_the_device_change_no_bit(count, tmp_path, process_group, monkeypatch):
    base = tiny_models.save("llama", tmp_path / "base", **DEEP)
    plain = recomputation.keep_what_fits

    def keep_some(model, config, plan, device, ring=None):
        plain(model, config, plan, device, ring)
        if ring:
            ring.keep_last(count)
            assert ring.num_passing == 6 - count

    stays = trained(base, tmp_path)
    monkeypatch.setattr(recomputation, "keep_what_fits", keep_some)
    assert trained(base, tmp_path, "cpu") == stays


def test_state_taken_with_weights_away_goes_on_to_the_same_bits_with_weights_that_stay(tmp_path, process_group):
    base = tiny_models.save("llama", tmp_path / "base", **DEEP)
    away = tiny_models.make_config(base, deepspeed={"offload_params": "cpu"})
    whole = engines.build(tiny_models.make_config(base), tmp_path / "whole")
    losses = engines.train(whole, range(4), fixed=False)
    first = engines.build(away, tmp_path / "first")
    begun = engines.train(first, range(2), fixed=False)
    second = engines.build(away, tmp_path / "second", resumed=first.state())
    assert begun + engines.train(second, range(2, 4), fixed=False) == losses
    assert adapter(second) == adapter(whole)


def test_two_workers_that_each_keep_the_base_on_their_host_train_the_adapter_of_shares(tmp_path):
    jobs = [Job(EMBEDDED, {"deepspeed": {"offload_params": offload}}) for offload in ("none", "cpu")]
    left = ranks.run(2, tmp_path / "run", *jobs)
    assert not any(held.error for job in left for held in job)
    assert len({held.adapter for job in left for held in job}) == 1


def test_a_file_that_is_cut_short_ends_the_run_and_takes_no_step(tmp_path, process_group, monkeypatch):
    base = tiny_models.save("llama", tmp_path / "base", **DEEP)
    files, plain = [], DiskFile.__init__

    def remember(self, *given):
        files.append(self)
        plain(self, *given)

    monkeypatch.setattr(DiskFile, "__init__", remember)
    config = tiny_models.make_config(base, deepspeed={"offload_params": "nvme", "nvme_path": str(tmp_path)})
    engine = engines.build(config, tmp_path / "run")
    engines.train(engine, range(1))
    before = adapter(engine)
    assert [name for name in os.listdir(tmp_path) if name not in ("base", "run")] == []  # nothing is left behind
    os.ftruncate(files[0]._file.fileno(), 1000)
    with pytest.raises(Stop, match=r"deepspeed.nvme_path=.*: the file of the base was cut short at byte"):
        engines.train(engine, range(1, 2))
    assert adapter(engine) == before


def test_a_folder_that_is_not_there_or_too_small_is_refused_with_numbers(tmp_path):
    with pytest.raises(ConfigError, match="no: No such file or directory; the base takes 1.0 GiB there"):
        DiskFile(str(tmp_path / "no"), 2**30)
    with pytest.raises(ConfigError, match=r"No space left on device; the base takes .* GiB there, .* GiB are free"):
        DiskFile("/dev/shm", 2**45)
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path} nfs4 rw 0 0\nc {tmp_path}/local xfs rw 0 0\n")
    found = [network_file_system(str(tmp_path / name), str(mounts)) for name in ("x", "local", "../y")]
    assert found == ["nfs4", None, None]


def test_weight_that_passes_otherwise_than_its_file_has_it_ends_the_run(tmp_path, process_group, monkeypatch):
    from qlora_ray.errors import GuardError
    from qlora_ray.model.ring import FromMemory

    plain = FromMemory.copy

    def with_a_wrong_byte(self, slab, slot, passed):
        arrival = plain(self, slab, slot, passed)
        slot[: slab.num_bytes : 64] ^= 1
        return arrival

    monkeypatch.setattr(FromMemory, "copy", with_a_wrong_byte)
    with pytest.raises(GuardError, match="is not what the base's files give"):
        engines.build(tiny_models.make_config(EMBEDDED, deepspeed={"offload_params": "cpu"}), tmp_path)
