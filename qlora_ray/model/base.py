"""Loads the frozen base in 4 bits: linear layers and experts packed, everything else in the compute dtype.

Stands on three internals of transformers and bitsandbytes: PLAIN_LINEAR, STAY_TRAINABLE and LAYERS_BY_NAME.
"""

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from qlora_ray.config import ModelConfig, QuantizationConfig, base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.libraries import Patch
from qlora_ray.model.architecture import build_empty, config_of, dense_config, load_filled
from qlora_ray.model.experts import misshapen_stacks, packed_while_loading
from qlora_ray.model.facts import has_mxfp4, loadable_folder, packed_weights, stored_quantization
from qlora_ray.model.hub import local_folder
from qlora_ray.model.own_code import refuse_unread_code
from qlora_ray.model.rope import put_on
from qlora_ray.model.routed import compute_in_4_bits
from qlora_ray.model.stack_files import Piece, pieces_of_stacks
from qlora_ray.model.whole import build_from_headers, refuse_unfilled

PLAIN_LINEAR = Patch(
    "transformers", "5.23.0", "modeling_falcon.FalconLinear is torch.nn.Linear, which has the same arithmetic",
    gains="Falcon in 4 bits: transformers quantizes nn.Linear itself, not its subclasses",
    delete_when="transformers quantizes subclasses, or Falcon uses nn.Linear",
)  # fmt: skip
STAY_TRAINABLE = Patch(
    "bitsandbytes", "0.50.2", "support_avx512bf16_for_cpu of every Linear4bit is off",
    gains="on CPUs with AVX512-BF16 training goes on after an evaluation: there the first forward in eval() repacks a "
    "weight for a kernel without a backward, and training silently gets no gradient",
    delete_when="Linear4bit undoes the repacking in train()",
)  # fmt: skip
LAYERS_BY_NAME = Patch(
    "transformers", "5.23.0", "get_modules_to_not_convert, replace_with_bnb_linear and its source_cls name the layers",
    gains="which layers load_base packs is known without memory for weights",
    delete_when="transformers lists what a quantization config will replace",
)  # fmt: skip


@dataclass(frozen=True)
class BytesByKind:
    """Bytes of a loaded base, by how they are stored."""

    four_bit: int
    other: int
    four_bit_parameters: int
    parameters: int

    @property
    def four_bit_share(self) -> float:
        """Share of the parameters that is stored in 4 bits."""
        return self.four_bit_parameters / self.parameters


def load_base(
    model: ModelConfig, quantization: QuantizationConfig, compute_dtype: str, device: torch.device,
    pack_experts: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """Load a causal language model, quantized while loading, frozen, without a key-value cache.

    Experts are packed too, where they can be, unless they shall stay as they were in an adapter's training.

    Packed weights are stored as uint8: ZeRO-3 casts floating storage to its own dtype, which silently breaks 4-bit
    weights stored in another one. Raises ConfigError where the files do not fill the model, or bring unread code.
    """
    _build_linear_layers_that_can_be_quantized()
    key, dtype = f"model.base_model={model.base_model}", getattr(torch, compute_dtype)
    folder = local_folder(model.base_model, model.revision)
    refuse_unread_code(folder, model, key)
    four_bit = four_bit_config(quantization, dtype)
    is_mxfp4 = has_mxfp4(folder)
    config = _config_of(folder, model, is_mxfp4)
    with packed_while_loading(is_mxfp4) if four_bit and pack_experts else nullcontext():
        base, found = load_filled(
            loadable_folder(folder, key), model.trust_remote_code, model.factory, quantization_config=four_bit,
            dtype=dtype, device_map={"": device}, **({"config": config} if config else {}),
        )  # fmt: skip
    found["mismatched_keys"] = {*found["mismatched_keys"], *misshapen_stacks(base)}
    refuse_unfilled(key, base, found)
    base.name_or_path = base_model_path(model.base_model)  # which PEFT writes down: not where it lies here
    _keep_weights_trainable_on_cpu(base)
    _compute_in(base, dtype)
    compute_in_4_bits(base)
    base.requires_grad_(False)
    base.config.use_cache = False
    return base


def _config_of(folder: str, model: ModelConfig, is_mxfp4: bool) -> Any:
    """The config that the base is built from; None where that is its config.json as it is."""
    if not is_mxfp4 and not model.rope_scaling:
        return None
    config = dense_config(folder) if is_mxfp4 else config_of(folder, model.trust_remote_code)
    return put_on(config, model.rope_scaling)


def four_bit_config(quantization: QuantizationConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes settings (QLoRA, arXiv:2305.14314), or None without quantization."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # announces optional CPU kernels on every load
    if quantization.type == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def count_bytes(model: torch.nn.Module) -> BytesByKind:
    """Bytes that really are 4-bit and bytes that are not. Call it before ZeRO shards the model."""
    from bitsandbytes.nn import Params4bit

    four_bit = other = four_bit_parameters = parameters = 0
    for parameter in model.parameters():
        # A worker may hold a share of it, or have put it away (model/homes.py).
        count = getattr(parameter, "ds_numel", getattr(parameter, "whole_shape", parameter.shape).numel())
        size = count * parameter.element_size()
        if isinstance(parameter, Params4bit):
            four_bit += size
            count = parameter.quant_state.shape.numel()
            four_bit_parameters += count
        else:
            other += size
        parameters += count
    return BytesByKind(four_bit, other, four_bit_parameters, parameters)


def _build_linear_layers_that_can_be_quantized() -> None:
    from transformers.models.falcon import modeling_falcon

    setattr(modeling_falcon, "FalconLinear", torch.nn.Linear)  # noqa: B010 - a type checker refuses the assignment


def _keep_weights_trainable_on_cpu(model: torch.nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have 4-bit layers compute in this dtype: a folder of 4-bit weights brings the one that it was saved with."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def packed_layers(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers of a loaded base that are in 4 bits, also where PEFT has wrapped them."""
    from bitsandbytes.nn import Linear4bit

    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    return sorted(name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names)


def four_bit_modules(
    folder: str, trust_remote_code: bool = False, factory: str | None = None
) -> tuple[dict[str, bool], str]:
    """Names of the layers that load_base packs, and whether each keeps its weight transposed (Conv1D).

    Also the prefix that a weight's name in a file may lack. Raises ConfigError where the files do not fill the model.
    """
    from transformers.pytorch_utils import Conv1D

    model = build_without_weights(folder, trust_remote_code, factory)
    return {name: layer.source_cls is Conv1D for name, layer in _pack(model, folder).items()}, model.base_model_prefix


def pieces_in_files(
    folder: str, names: Iterable[str], trust_remote_code: bool = False, factory: str | None = None
) -> dict[str, Piece]:
    """What the weights of these names in a base's files are of its stacks of experts. Raises ConfigError."""
    try:
        return pieces_of_stacks(build_without_weights(folder, trust_remote_code, factory), names)
    except ValueError as error:
        raise ConfigError(f"model.base_model={folder}: {error}.") from error


def count_parameters(model: PreTrainedModel, folder: str) -> tuple[int, int]:
    """Parameters of the linear layers that load_base packs, and all of the base in `folder`. Packs the layers.

    `model` is built without weights. Raises ConfigError where the files hold others in 4 bits than config.json says.
    """
    layers = _pack(model, folder)
    if stored_quantization(folder):
        _refuse_half_packed(folder, list(layers))
    packed = sum(layer.weight.numel() for layer in layers.values())
    return packed, sum(parameter.numel() for parameter in model.parameters())


def packs_experts(folder: str) -> bool:
    """Whether load_base packs the experts that can be: not of a folder whose linear layers are packed already."""
    return stored_quantization(folder) is None


def _refuse_half_packed(folder: str, layers: list[str]) -> None:
    stored, wanted = packed_weights(folder), [f"{name}.weight" for name in layers]
    if len(stored) == len(wanted):
        return
    # A file's names may lack the model's prefix.
    others = [name for name in wanted if not any(name.endswith(one) or one.endswith(name) for one in stored)]
    others += [name for name in stored if not any(name.endswith(one) or one.endswith(name) for one in wanted)]
    raise ConfigError(
        f"model.base_model={folder}: config.json says of {len(wanted)} layers that they are stored in 4 bits, and the "
        f"files hold {len(stored)} so; one that differs is {others[0]}. Name in llm_int8_skip_modules those that are "
        "stored in 16 bits, or download the folder again."
    )


def build_without_weights(folder: str, trust_remote_code: bool = False, factory: str | None = None) -> PreTrainedModel:
    """The model that load_base builds, on the meta device, not packed.

    Raises ConfigError where the files do not fill the model.
    """
    _build_linear_layers_that_can_be_quantized()
    return build_from_headers(folder, trust_remote_code, factory)


def build_from_config(folder: str, trust_remote_code: bool = False, factory: str | None = None) -> PreTrainedModel:
    """The same of a folder without weights. Raises ConfigError where config.json makes no causal language model."""
    _build_linear_layers_that_can_be_quantized()
    with torch.device("meta"):
        model = build_empty(folder, trust_remote_code, factory)
    model.tie_weights()
    return model


def _pack(model: PreTrainedModel, folder: str) -> dict[str, Any]:
    """Replace the layers that load_base packs, in place; returns them by name."""
    four_bit = four_bit_config(QuantizationConfig(), torch.float32)  # first of all, it silences bitsandbytes' import
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    skipped = (stored_quantization(folder) or {}).get("llm_int8_skip_modules")  # of weights that are packed already
    left_alone = HfQuantizer.get_modules_to_not_convert(model, skipped, list(model._keep_in_fp32_modules or ()))
    replace_with_bnb_linear(model, modules_to_not_convert=left_alone, quantization_config=four_bit)
    return {name: module for name, module in model.named_modules() if hasattr(module, "source_cls")}
