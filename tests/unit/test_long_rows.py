"""The MLP of long rows by slices: the same gradients, the same bits whatever is kept, and nothing whole in between."""

import pytest
import torch

from qlora_ray.model import attention, layer, parked, slices
from qlora_ray.model.families import FAMILIES
from qlora_ray.model.fused import fused_layers, keep
from qlora_ray.model.layer import FusedLayer
from qlora_ray.model.recompute import Choice, Keep
from qlora_ray.worker.loss import sum_of_nats
from tests import fused_models
from tests.integration import tiny_models

DORA = {"lora_variant": "dora"}
FEW = ("llama", "gemma3_text", "granite")  # no norm after attention and MLP, one each, a factor
LEVELS = [Keep.ALL, Keep.PRODUCTS, Keep.ATTENTION, Keep.INPUT]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: fused_models.save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def short(monkeypatch):
    """Rows of 24 tokens are long, and taken 16 at a time: two of them in three slices."""
    monkeypatch.setattr(slices, "LONG_ROW", 8)
    monkeypatch.setattr(slices, "SLICE_ROWS", 16)


def gradients(folder, level=Keep.ALL, places=False, **model):
    made = fused_models.build(folder, torch.float32, **model)
    keep(made, Choice((level,) * 2))
    torch.manual_seed(7)
    batch = tiny_models.batch()
    return fused_models.nats_and_gradients(made, fused_models.with_places(batch) if places else batch)


def same(one, other) -> bool:
    return one[0] == other[0] and all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize(
    "family, more",
    [*((family, {}) for family in FAMILIES), *((family, {"lora_dropout": 0.3}) for family in FEW),
     *((family, DORA) for family in FEW)],
)  # fmt: skip
def test_gradients_by_slices_are_those_of_all_rows_at_once(folders, family, more, short, monkeypatch):
    by_slices = gradients(folders[family], Keep.INPUT, **more)
    monkeypatch.setattr(slices, "LONG_ROW", 24)
    at_once = gradients(folders[family], Keep.INPUT, **more)
    assert by_slices[0] == pytest.approx(at_once[0], rel=1e-6)
    assert fused_models.error(by_slices[1], at_once[1]) < 1e-5


@pytest.mark.parametrize("batch", ["rows", "packed"])
@pytest.mark.parametrize(
    "family, more",
    [*((family, {}) for family in FAMILIES), *((family, {"lora_dropout": 0.3}) for family in FEW),
     *((family, DORA) for family in FEW)],
)  # fmt: skip
def test_slices_on_and_off_have_the_same_bits(folders, family, more, batch, short, monkeypatch):
    batch = fused_models.packed_batch() if batch == "packed" else tiny_models.batch()
    found = []
    for takes_slices in (True, False):
        monkeypatch.setattr(FusedLayer, "takes_slices", takes_slices)
        made = fused_models.build(folders[family], torch.float32, **more)
        keep(made, Choice((Keep.INPUT,) * 2))
        torch.manual_seed(7)
        found.append(fused_models.nats_and_gradients(made, batch))
    assert same(*found)


@pytest.mark.parametrize("level", [Keep.ALL, Keep.PARKED, Keep.INPUT])
def test_dropout_of_the_base_itself_has_the_same_masks_by_slices(tmp_path, level, short, monkeypatch):
    folder = tiny_models.save("gpt2", tmp_path, **fused_models.OWN_DROPOUT["gpt2"])
    by_slices = gradients(folder, level)
    monkeypatch.setattr(slices, "LONG_ROW", 24)
    at_once = gradients(folder)
    assert by_slices[0] == pytest.approx(at_once[0], rel=1e-6)
    assert fused_models.error(by_slices[1], at_once[1]) < 1e-5


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("more", [{}, DORA], ids=["lora", "dora"])
def test_what_is_kept_of_long_rows_changes_no_bit(folders, family, more, short):
    whole = gradients(folders[family], Keep.ALL, **more)
    assert all(same(whole, gradients(folders[family], level, **more)) for level in LEVELS[1:])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_that_are_not_asked_for_are_left_out_of_slices_too(folders, family, short, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_ROWS", 10)
    made, whole = gradients(folders[family], places=True), gradients(folders[family])
    assert made[0] == pytest.approx(whole[0], rel=1e-6)
    assert fused_models.error(made[1], whole[1]) < 1e-5


def test_gate_and_up_of_long_rows_are_never_whole(folders, short, monkeypatch):
    rows, plain = [], FusedLayer._hidden
    monkeypatch.setattr(FusedLayer, "_hidden", lambda self, kept: rows.append(len(kept.gate_up)) or plain(self, kept))
    made = fused_models.build(folders["llama"], torch.float32)
    keep(made, Choice((Keep.INPUT,) * 2))
    fused_models.nats_and_gradients(made, tiny_models.batch())
    assert set(rows) == {16}


def test_weights_of_long_rows_are_dequantized_once_a_pass(folders, short, monkeypatch):
    from qlora_ray.model import ops_plain

    counted, dequantize = [], ops_plain.dequantize
    monkeypatch.setattr(ops_plain, "dequantize", lambda *given: counted.append(1) or dequantize(*given))
    gradients(folders["llama"], Keep.INPUT)
    by_slices = len(counted)
    counted.clear()
    monkeypatch.setattr(slices, "LONG_ROW", 24)
    gradients(folders["llama"], Keep.INPUT)
    assert 0 < by_slices < len(counted)  # gate and up are made once for forward and backward


def test_rows_up_to_8192_tokens_are_taken_at_once():
    assert slices.of_rows(4 * 8192, 8192) == () and slices.of_rows(8192, 65536) == ()
    cut = slices.of_rows(20000, 20000)
    assert [part.stop - part.start for part in cut] == [8192, 8192, 3616] and cut[-1].stop == 20000


class Shelf:
    """A stash in memory that hands out each tensor once, as the one on a GPU does."""

    def __init__(self):
        self.held, self.most, self.num_leaving = {}, 0, 0

    def put(self, slot, x):
        assert slot not in self.held
        self.held[slot] = x.clone()
        self.most = max(self.most, len(self.held))
        self.num_leaving += 1

    def let_go(self):
        self.num_leaving = 0

    def take(self, slot):
        self.let_go()
        return self.held.pop(slot)


@pytest.mark.parametrize("family, batch", [("llama", "packed"), *((family, "rows") for family in FEW)])
@pytest.mark.parametrize("has_stash", [True, False])
def test_attention_that_is_parked_changes_no_bit(folders, family, batch, has_stash, monkeypatch):
    batch = fused_models.packed_batch() if batch == "packed" else tiny_models.batch()
    made, shelf = fused_models.build(folders[family], torch.float32), Shelf()
    whole = fused_models.nats_and_gradients(made, batch)
    for one in fused_layers(made):
        one.stash = shelf if has_stash else None
    keep(made, Choice((Keep.PARKED,) * 2))
    monkeypatch.setattr(parked, "SMALL_BYTES", 64)
    assert same(whole, fused_models.nats_and_gradients(made, batch))
    assert not shelf.held and shelf.most >= 4 * has_stash


def test_what_is_on_its_way_to_the_host_is_let_go_of_before_the_peak_of_layers_that_keep_all(folders):
    made, shelf = fused_models.build(folders["llama"], torch.float32), Shelf()
    for one in fused_layers(made):
        one.stash = shelf
    keep(made, Choice((Keep.HOST, Keep.ALL)))
    nats = sum_of_nats(made, tiny_models.batch())
    assert len(shelf.held) == 1 and not shelf.num_leaving
    nats.backward()
    assert not shelf.held


def test_attention_that_is_parked_is_not_computed_again(folders, monkeypatch):
    counted = []
    monkeypatch.setattr(layer, "attend", lambda *given: counted.append(1) or attention.attend(*given))
    for level, times in ((Keep.PARKED, 2), (Keep.INPUT, 4)):
        counted.clear()
        gradients(folders["llama"], level)
        assert len(counted) == times
