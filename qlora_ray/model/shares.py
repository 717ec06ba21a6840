"""A worker's share of a weight, and its packing in 4 bits: the bits that packing the whole would give.

Blocks of 64 consecutive values of the flattened weight are packed by themselves, and ZeRO-3's share of a parameter is
one stretch of it, so a worker packs what its share touches. What the scales are quantized with takes all of them: each
worker fills in its own, and the largest over all workers is the scale of each block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK_OF_SCALES = 256  # bitsandbytes.functional.quantize_4bit

# start, stop -> the values from start to stop of the flattened weight, in the compute dtype, where they are packed
Cut = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Share:
    """Which part of each parameter a worker holds: as many values as any other, the last ones of them padding."""

    rank: int
    size: int

    def length(self, numel: int) -> int:
        """Values that each worker holds of a parameter of `numel`."""
        return -(-numel // self.size)

    def of(self, numel: int) -> tuple[int, int]:
        """Where the share begins and ends, without its padding."""
        length = self.length(numel)
        return min(numel, self.rank * length), min(numel, (self.rank + 1) * length)

    def padded(self, values: torch.Tensor, numel: int) -> torch.Tensor:
        """The values of the share, as long as every worker's."""
        missing = self.length(numel) - values.numel()
        is_at_border = values.storage_offset() == 0  # of memory, as collectives want it
        return torch.nn.functional.pad(values, (0, missing)) if missing or not is_at_border else values


@dataclass(frozen=True)
class FourBit:
    """How bitsandbytes packs a weight."""

    quant_type: str
    double_quant: bool
    block: int  # values of one scale


def num_packed(numel: int) -> int:
    """Bytes that hold so many values."""
    return (numel + 1) // 2


def num_scales(state: "QuantState") -> list[int]:
    """Scales of a packed weight, and of those where they are quantized too."""
    counts = [-(-state.shape.numel() // state.blocksize)]
    return [*counts, -(-counts[0] // BLOCK_OF_SCALES)] if state.nested else counts


def pack_share(cut: Cut, numel: int, share: Share, how: FourBit) -> tuple[torch.Tensor, torch.Tensor]:
    """The share's packed bytes, and a scale for each block of the whole weight: 0 where the share does not touch it."""
    from bitsandbytes.functional import quantize_4bit

    begin, end = share.of(num_packed(numel))
    start, stop = 2 * begin // how.block * how.block, min(numel, -(-2 * end // how.block) * how.block)
    values = cut(start, max(start, stop)) if end > begin else cut(0, 0)
    scales = torch.zeros(-(-numel // how.block), device=values.device)
    if not values.numel():
        return share.padded(values.to(torch.uint8), num_packed(numel)), scales
    packed, state = quantize_4bit(
        values, blocksize=how.block, compress_statistics=False, quant_type=how.quant_type, quant_storage=torch.uint8
    )
    scales[start // how.block : -(-stop // how.block)] = state.absmax
    return share.padded(packed.view(-1)[begin - start // 2 : end - start // 2], num_packed(numel)), scales


def state_of(scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype, how: FourBit) -> "QuantState":
    """What bitsandbytes keeps beside a packed weight, from the scale of each of its blocks."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    absmax, offset, of_scales = scales, None, None
    if how.double_quant:
        offset = scales.mean()
        absmax, of_scales = quantize_blockwise(scales - offset, blocksize=BLOCK_OF_SCALES)
    return QuantState(
        absmax=absmax, shape=shape, code=get_4bit_type(how.quant_type, device=scales.device), blocksize=how.block,
        quant_type=how.quant_type, dtype=dtype, offset=offset, state2=of_scales,
    )  # fmt: skip
