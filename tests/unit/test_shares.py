"""Packing by shares gives the bits of packing the whole; pieces of files stand for the tensors that they make up."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file

from qlora_ray.errors import ConfigError
from qlora_ray.model.pieces import Pieces, lazily
from qlora_ray.model.shares import FourBit, Share, num_packed, pack_share, state_of
from qlora_ray.model.tensors import TensorFiles

SHAPES = [(64, 64), (128, 100), (7, 33), (65, 3), (1, 5)]  # of whole blocks, of parts of some, and fewer than workers


def pack(weight: torch.Tensor, share: Share, how: FourBit) -> tuple[torch.Tensor, torch.Tensor]:
    return pack_share(lambda start, stop: weight.flatten()[start:stop], weight.numel(), share, how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_one_to_six_shares_have_the_bits_and_scales_of_the_whole(dtype, quant_type, double_quant):
    how = FourBit(quant_type, double_quant, 64)
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        packed, exact = quantize_4bit(weight, compress_statistics=double_quant, quant_type=quant_type)
        for size in range(1, 7):
            parts = [pack(weight, Share(rank, size), how) for rank in range(size)]
            assert torch.equal(torch.cat([part for part, _ in parts])[: num_packed(weight.numel())], packed.view(-1))
            ours = state_of(torch.stack([scales for _, scales in parts]).amax(0), weight.shape, dtype, how)
            assert torch.equal(ours.absmax, exact.absmax) and torch.equal(ours.code, exact.code)
            assert (ours.shape, ours.dtype, ours.nested) == (exact.shape, exact.dtype, exact.nested)
            if double_quant:
                assert torch.equal(ours.offset, exact.offset) and torch.equal(ours.state2.absmax, exact.state2.absmax)
                assert ours.state2.blocksize == exact.state2.blocksize and ours.state2.dtype == exact.state2.dtype


@pytest.fixture
def stored(tmp_path):
    """Three tensors, and what stands for them."""
    tensors = {f"weight{number}": torch.randn(4, 6).to(torch.bfloat16) for number in range(3)}
    save_file(tensors, tmp_path / "one.safetensors")
    pieces = lazily(TensorFiles([tmp_path / "one.safetensors"], "key"), "key")
    return list(tensors.values()), [pieces[name] for name in tensors]


@pytest.mark.parametrize("join", [torch.stack, torch.cat])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_stacked_and_joined_pieces_are_read_in_any_stretch(stored, join, dim):
    tensors, pieces = stored
    exact, ours = join(tensors, dim=dim), join(pieces, dim=dim)
    assert isinstance(ours, Pieces) and ours.shape == exact.shape
    assert torch.equal(ours.read(), exact)
    for start, stop in [(0, 1), (3, 50), (10, 11), (23, 25), (72, 72), (0, 72)]:
        assert torch.equal(ours.cut(start, stop), exact.flatten()[start:stop])


def test_experts_as_transformers_merges_them_are_pieces_still(stored):
    tensors, pieces = stored
    exact = torch.cat([torch.stack(tensors), torch.stack(tensors[::-1])], dim=1)
    ours = torch.cat([torch.stack(pieces), torch.stack(pieces[::-1])], dim=1)
    assert isinstance(ours, Pieces) and torch.equal(ours.read(), exact)


def test_any_other_operation_reads_the_whole(stored):
    tensors, pieces = stored
    assert torch.equal(torch.transpose(pieces[0], 0, 1), tensors[0].T)
    assert torch.equal(torch.cat([pieces[0], tensors[1]]), torch.cat(tensors[:2]))
    assert torch.equal(pieces[0].view(2, 12), tensors[0].view(2, 12)) and pieces[0].ndim == 2
    assert torch.equal(torch.cat([pieces[0].to("cpu", torch.float32)]).read(), tensors[0].float())


def test_file_that_was_cut_short_since_it_was_opened_is_named(tmp_path):
    save_file({"weight": torch.zeros(64)}, tmp_path / "one.safetensors")
    pieces = lazily(TensorFiles([tmp_path / "one.safetensors"], "key"), "key")
    content = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(content[:-4])
    assert torch.equal(pieces["weight"].cut(0, 63), torch.zeros(63))
    with pytest.raises(ConfigError, match=r"one.safetensors: ends inside the tensor weight"):
        pieces["weight"].read()
