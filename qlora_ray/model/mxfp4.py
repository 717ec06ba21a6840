"""Stacks of gpt_oss's experts in MXFP4, dense again as they are read, to be packed like any other."""

from typing import Any

import torch

from qlora_ray.libraries import Patch
from qlora_ray.model.pieces import Pieces

BLOCKS_AND_SCALES = Patch(
    "transformers", "5.23.0", "serialized_names of Mxfp4HfQuantizer tell which files' tensors make a stack, "
    "Mxfp4Dequantize makes it of them, and get_weight_conversions of Bnb4BitHfQuantizer is extended by that",
    gains="gpt_oss from its published files, without a copy in 16 bits",
    delete_when="transformers packs in bitsandbytes' 4 bits what it has read in others",
)  # fmt: skip


def conversions(quantizer: Any) -> list[Any]:
    """What transformers shall do with such tensors while it loads a base."""
    from transformers.core_model_loading import WeightConverter
    from transformers.integrations.mxfp4 import Mxfp4Dequantize
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    class Dequantize(Mxfp4Dequantize):
        def convert(self, input_dict, **more):  # type: ignore[override]
            return super().convert({name: _read(value) for name, value in input_dict.items()}, **more)

    names = Mxfp4HfQuantizer.serialized_names.items()
    return [WeightConverter(stored, stack, [Dequantize(quantizer)]) for stack, stored in names]


def _read(value: Any) -> torch.Tensor:
    one = value[0] if isinstance(value, list) else value
    return one.cut(0, one.numel()).view(one.shape) if isinstance(one, Pieces) else one
