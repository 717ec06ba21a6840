"""4-bit weights that one run packed are another's: the same bits, read from less; what is not whole is never taken."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState
from safetensors.torch import load_file

from qlora_ray import train
from qlora_ray.config import base_model_path
from qlora_ray.errors import ConfigError, GuardError
from qlora_ray.model import packed_cache, pieces
from qlora_ray.model.packed_cache import Cached, cached
from qlora_ray.model.record import base_tensors
from qlora_ray.model.tensors import TensorFiles
from qlora_ray.worker.messages import Warned
from tests.integration import engines, ranks, tiny_models
from tests.integration.ranks import Job

EMBEDDED = base_model_path("embedded")
CACHED = {"model": {"cache_quantized": True}}


@pytest.fixture
def build(tmp_path, process_group, monkeypatch):
    """Sets up a worker of a run with a cache; returns the engine, what was told, and the names of what was read."""
    reads: list[str] = []
    read_bytes = pieces.read_bytes

    def noting(name, entry, start, stop):
        reads.append(f"{entry.file.parent.name}/{name}")
        return read_bytes(name, entry, start, stop)

    monkeypatch.setattr(pieces, "read_bytes", noting)

    def build_it(**sections):
        team = engines.Alone()
        monkeypatch.setattr(engines, "Alone", lambda: team)
        reads.clear()
        config = tiny_models.make_config(EMBEDDED, **{**CACHED, **sections})
        return engines.build(config, tmp_path), team.told, list(reads)

    return build_it


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").glob("base-*") if path.is_dir())


def packed_of(engine) -> dict[str, torch.Tensor]:
    packed = {n: p for n, p in engine.module.named_parameters() if hasattr(p, "quant_state")}
    return {name: torch.cat([one.data.view(-1), one.quant_state.absmax]) for name, one in packed.items()}


def test_second_run_reads_the_weights_that_the_first_one_packed(build, tmp_path):
    stage = {"deepspeed": {"zero_stage": 0}}
    plain, _, _ = build(**stage, model={"cache_quantized": "auto"})
    assert not caches(tmp_path)  # of one so small it is not worth it
    first, _, _ = build(**stage)
    second, told, reads = build(**stage)
    (folder,) = caches(tmp_path)
    assert not told
    base = {name for name in reads if not name.startswith(folder.name)}
    assert sum("_proj" in name for name in base) == 1  # the one that the guard packs anew
    for other in (first, second):
        for name, values in packed_of(plain).items():
            assert torch.equal(packed_of(other)[name], values)
    assert engines.train(second, range(2)) == engines.train(plain, range(2))


def test_files_have_the_keys_that_bitsandbytes_reads(build, tmp_path):
    engine, _, _ = build(deepspeed={"zero_stage": 0})
    (folder,) = caches(tmp_path)
    stored = load_file(folder / "packed-00000.safetensors")
    weight = "model.layers.0.mlp.down_proj.weight"
    state = QuantState.from_dict(
        {name.removeprefix(f"{weight}."): one for name, one in stored.items() if name.startswith(f"{weight}.")}, "cpu"
    )
    held = engine.module.get_parameter("base_model.model.model.layers.0.mlp.down_proj.base_layer.weight")
    assert torch.equal(stored[weight], held.data) and state == held.quant_state


def test_workers_write_by_turns_and_read_their_shares_of_it(tmp_path):
    plain, written, read = ranks.run(
        2, tmp_path / "run", Job(EMBEDDED), Job(EMBEDDED, CACHED, place="a"), Job(EMBEDDED, CACHED, place="a")
    )
    (folder,) = caches(tmp_path / "run" / "a.0")
    assert len(list(folder.glob("*.safetensors"))) == 2
    for one, other, third in zip(plain, written, read, strict=True):
        assert one.shares == other.shares == third.shares and one.scales == other.scales == third.scales
        assert one.adapter == other.adapter == third.adapter and not third.error
    assert read[1].bytes_read < 0.6 * plain[1].bytes_read


def test_cache_that_was_cut_short_underneath_is_refused_and_a_wrong_one_stops_the_run(build, tmp_path):
    build()
    (folder,) = caches(tmp_path)
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ConfigError, match=r"packed-00000.safetensors: has \d+ bytes, and its manifest.json says"):
        build()
    file.write_bytes(content[:-100_000] + bytes(100_000))
    with pytest.raises(ConfigError, match="is damaged"):
        build()
    wrong = bytearray(content)
    for name, entry in TensorFiles([file], "").entries.items():
        wrong[entry.offset] ^= name.endswith(".weight")
    file.write_bytes(wrong)
    with pytest.raises(GuardError, match="is not what the base's files give"):
        build()
    shutil.rmtree(folder)
    build()
    assert caches(tmp_path) == [folder]


def test_another_base_setting_device_or_library_has_a_place_of_its_own(tmp_path, monkeypatch):
    base = base_tensors(EMBEDDED, "")
    settings = {"type": "nf4", "double_quant": True}
    moved = shutil.copytree(EMBEDDED, tmp_path / "base")
    (moved / "model.safetensors").touch()  # as one that was written anew

    def place(base=base, settings=settings, dtype="bfloat16", device="cpu") -> Path:
        return cached(tmp_path, base, settings, dtype, device).folder

    first = place()
    others = [
        place(base_tensors(str(moved), "")), place(settings={**settings, "type": "fp4"}), place(dtype="float32"),
        place(settings={**settings, "double_quant": False}), place(device="NVIDIA H100"),
    ]  # fmt: skip
    monkeypatch.setattr(packed_cache, "version", lambda name: "0")
    assert len({first, *others, place()}) == 7
    monkeypatch.undo()
    assert place() == first


def test_run_that_meets_one_that_writes_packs_for_itself_and_what_a_killed_one_left_is_removed(build, tmp_path):
    build()
    (folder,) = caches(tmp_path)
    content = {file.name: file.read_bytes() for file in folder.iterdir()}
    left = folder.rename(folder.with_name(f"{folder.name}.tmp"))
    (left / "packed-00007.safetensors").write_bytes(b"of a larger group")
    with Cached(folder, {}).lock() as is_mine:
        assert is_mine
        build()
        assert caches(tmp_path) == [left]
    build()
    assert caches(tmp_path) == [folder]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == content


def test_full_disk_costs_the_cache_and_not_the_run(build, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed_cache, "write_raw", full)
    engine, (told,), _ = build()
    assert isinstance(told, Warned) and "could not be kept in" in told.text and "No space left" in told.text
    assert not caches(tmp_path) and engines.train(engine, range(1))


def test_storage_that_is_no_folder_is_refused_where_the_cache_is_asked_for(refused):
    message = refused(train, "model.cache_quantized=true", "ray.storage_path=mock://somewhere")
    assert "model.cache_quantized=true: ray.storage_path=mock://somewhere is no folder" in message
