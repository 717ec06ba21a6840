"""Long rows on a GPU: indices beyond 2^31, slices, and attention that comes back from the host."""

import pytest
import torch

from qlora_ray.model import ops_plain, slices
from qlora_ray.model.dropout import Drop
from qlora_ray.model.fused import fused_layers, keep
from qlora_ray.model.layer import FusedLayer
from qlora_ray.model.norm import Norm
from qlora_ray.model.ops_plain import Angles
from qlora_ray.model.recompute import Choice, Keep
from qlora_ray.model.stash import HostStash
from tests import fused_models
from tests.integration import tiny_models

pytestmark = pytest.mark.gpu
LENGTH, HEADS, SIZE = 2**19, 40, 128  # 524,288 x 5,120: more than 2^31
TAIL = slice(-4096, None)  # rows beyond 2^31 elements


def wide() -> torch.Tensor:
    """(LENGTH, HEADS x SIZE) in bfloat16: 5 GiB."""
    torch.manual_seed(0)
    return torch.randn(LENGTH, HEADS * SIZE, dtype=torch.bfloat16, device="cuda")


def test_rows_beyond_2_31_elements_are_normalized_as_alone():
    from qlora_ray.model import ops_triton

    x, weight = wide(), torch.rand(HEADS * SIZE, dtype=torch.bfloat16, device="cuda")
    norm, out = Norm(weight, 1e-6, plus_one=False, rounds_first=True), torch.empty_like(x)
    ops_triton.norm_rows(x, None, norm, out)
    alone = torch.empty_like(x[TAIL])
    ops_triton.norm_rows(x[TAIL].clone(), None, norm, alone)
    assert torch.equal(out[TAIL], alone)
    back = torch.empty_like(x)
    ops_triton.norm_rows_backward(out, x, norm, None, back)
    ops_triton.norm_rows_backward(out[TAIL].clone(), x[TAIL].clone(), norm, None, alone)
    assert torch.equal(back[TAIL], alone)


def test_heads_beyond_2_31_elements_are_rotated_as_alone():
    from qlora_ray.model import ops_triton

    heads = wide().view(LENGTH, HEADS, SIZE)
    turn = torch.rand(LENGTH, SIZE, dtype=torch.float32, device="cuda")
    angles, of_tail = Angles(turn.cos(), turn.sin()), Angles(turn[TAIL].cos(), turn[TAIL].sin())
    alone = heads[TAIL].clone()
    ops_triton.rotate(heads, angles)
    ops_triton.rotate(alone, of_tail)
    assert torch.equal(heads[TAIL], alone)
    # Gradients of attention lie head by head, (B, H, T, E): the last heads begin beyond 2^31.
    dq = heads.transpose(0, 1).contiguous()[None]
    few, out = dq[:, :1], torch.empty(LENGTH, (HEADS + 2) * SIZE, dtype=torch.bfloat16, device="cuda")
    ops_triton.rotate_backward(dq, few, few, angles, out)
    expected = torch.empty_like(out[TAIL])
    ops_plain.rotate_backward(dq[:, :, TAIL], few[:, :, TAIL], few[:, :, TAIL], of_tail, expected)
    assert (out[TAIL].float() - expected.float()).abs().max() < 0.05  # rounded once or twice in bfloat16


def test_wide_rows_beyond_2_31_elements_pass_the_activation_as_alone():
    from qlora_ray.model import ops_triton

    gate_up = wide()
    out, alone = (gate_up.new_empty(len(part), HEADS * SIZE // 2) for part in (gate_up, gate_up[TAIL]))
    ops_triton.activate(gate_up, False, out)
    ops_triton.activate(gate_up[TAIL].clone(), False, alone)
    assert torch.equal(out[TAIL], alone)


def test_masks_of_a_slice_are_those_of_all_rows():
    from qlora_ray.model import ops_triton

    x, a = torch.randn(512, 256, device="cuda"), torch.randn(16, 256, device="cuda")
    drop = Drop(0.3, 77)
    within, behind = (drop.of_rows(slice(256, stop), x.device) for stop in (384, 512))
    whole, part = torch.empty(512, 16, device="cuda"), torch.empty(128, 16, device="cuda")
    ops_triton.lora_in(x, a, drop, whole)
    ops_triton.lora_in(x[256:384], a, within, part)
    assert torch.equal(whole[256:384], part)
    dz, dx, dx_part = whole.clone(), torch.zeros_like(x), torch.zeros_like(x[:128])
    ops_triton.add_lora_back(dz, a, drop, dx)
    ops_triton.add_lora_back(dz[256:384], a, within, dx_part)
    assert torch.equal(dx[256:384], dx_part)
    of_slices = ops_triton.lora_in_gradient(dz[:256], x[:256], drop)
    of_slices += ops_triton.lora_in_gradient(dz[256:], x[256:], behind)
    whole_gradient = ops_triton.lora_in_gradient(dz, x, drop)
    assert (of_slices - whole_gradient).norm() < 1e-5 * whole_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", ["rows", "packed"])
def test_what_long_rows_keep_changes_no_bit(tmp_path, dtype, batch, monkeypatch):
    monkeypatch.setattr(slices, "LONG_ROW", 8)
    monkeypatch.setattr(slices, "SLICE_ROWS", 16)
    made = fused_models.build(fused_models.save("llama", tmp_path), dtype, "cuda")
    batch = fused_models.packed_batch() if batch == "packed" else tiny_models.batch()
    found = []
    for level in (Keep.ALL, Keep.PARKED, Keep.HOST):
        keep(made, Choice((level,) * 2))
        found.append(fused_models.nats_and_gradients(made, batch))
    for nats, gradients in found[1:]:
        assert nats == found[0][0]
        assert all(torch.equal(value, found[0][1][name]) for name, value in gradients.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers that are wide enough for the kernels of large ones."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_models.save("llama", tmp_path_factory.mktemp("wide"), **sizes)


def long_row(count: int) -> dict:
    ids = torch.randint(3, 2048, (1, count), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("model", [{}, {"lora_dropout": 0.1}, {"lora_variant": "dora"}])
def test_slices_on_and_off_have_the_same_bits(folder, model, monkeypatch):
    """Of the last layer's MLP: kernels behind it, of attention, may add in another order each time."""
    found = []
    for takes_slices in (True, False):
        monkeypatch.setattr(FusedLayer, "takes_slices", takes_slices)
        made = fused_models.build(folder, torch.bfloat16, "cuda", **model)
        keep(made, Choice((Keep.INPUT,) * 2))
        torch.manual_seed(7)
        found.append(fused_models.nats_and_gradients(made, long_row(20000)))
    (nats, one), (other_nats, other) = found
    of_last = [name for name in one if "layers.1.mlp" in name]
    assert nats == other_nats and len(of_last) >= 6
    assert all(torch.equal(one[name], other[name]) for name in of_last)


def test_attention_of_a_long_row_is_the_same_from_the_host(folder):
    """16,384 tokens: large enough to be parked, by the kernel that long rows take."""
    made = fused_models.build(folder, torch.bfloat16, "cuda")
    found = []
    for level in (Keep.ALL, Keep.PARKED):
        keep(made, Choice((level,) * 2))
        found.append(fused_models.nats_and_gradients(made, long_row(16384)))
    assert found[0][0] == found[1][0]
    error = fused_models.error(found[1][1], found[0][1])
    assert error < 1e-2  # backward kernels may add in another order each time
    assert all(isinstance(one.stash, HostStash) for one in fused_layers(made))


def test_host_memory_is_pinned_to_the_byte():
    stash = HostStash(torch.device("cuda"))
    x = torch.randn(1000, 3, device="cuda")
    for rows in (1000, 700, 1000):
        stash.put(3, x[:rows])
        assert torch.equal(stash.take(3), x[:rows])
    assert stash._slots[3].is_pinned() and stash._slots[3].untyped_storage().nbytes() == x.nbytes
