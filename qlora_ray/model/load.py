"""The frozen base where workers share it: each reads, packs and keeps its share of every weight, one weight at a time.

transformers loads as ever, and names, renames, merges and ties the weights. Only its hands are replaced: what it opens
holds Pieces, which are read where a parameter is made of them. Stands on internals of transformers: OWN_PARAMETERS.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from qlora_ray.config import ModelConfig, QuantizationConfig
from qlora_ray.libraries import Patch
from qlora_ray.model.base import load_base
from qlora_ray.model.facts import loadable_folder, safetensors_files
from qlora_ray.model.hub import local_folder
from qlora_ray.model.packed_cache import Writer
from qlora_ray.model.pieces import Packed, Pieces, lazily
from qlora_ray.model.shares import FourBit, Share, num_packed, pack_share, state_of
from qlora_ray.model.staging import Staging
from qlora_ray.model.tensors import TensorFiles

OWN_PARAMETERS = Patch(
    "transformers", "5.23.0", "set_param_for_module of core_model_loading, get_quantize_ops of Bnb4BitHfQuantizer, and "
    "safe_open, _is_on_hf_mount and caching_allocator_warmup of modeling_utils are replaced while from_pretrained runs",
    gains="a worker reads, packs and holds its share of a base that no GPU could hold whole",
    delete_when="from_pretrained makes ZeRO-3's shares of quantized weights (deepspeed #5660)",
)  # fmt: skip


class Keeper(Protocol):
    """Who makes parameters of shares. Every worker must call its methods in the same order."""

    share: Share

    def keep(self, parameter: torch.nn.Parameter, share: torch.Tensor) -> None:
        """Make of a parameter of the whole shape, without memory, one of which this worker holds `share`."""

    def keep_scales(self, state: Any) -> None:
        """Hold those of a packed weight as it is held. Not called before whoever needs them whole has had them."""

    def whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What all workers hold of it together."""

    def take_largest(self, values: torch.Tensor) -> None:
        """Put the largest of all workers' values in the place of each."""

    def is_everywhere(self, answer: bool) -> bool:
        """Whether the answer is yes on every worker."""


class Whole:
    """A keeper that is alone: its share of each parameter is all of it."""

    share = Share(0, 1)

    def keep(self, parameter: torch.nn.Parameter, share: torch.Tensor) -> None:
        """Give the parameter its memory."""
        parameter.data = share.view(parameter.shape)

    def keep_scales(self, state: Any) -> None:
        """They are where they are."""

    def whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What it holds."""
        return parameter.data

    def take_largest(self, values: torch.Tensor) -> None:
        """There are no others."""

    def is_everywhere(self, answer: bool) -> bool:
        """Whether the answer is yes."""
        return answer


@dataclass(frozen=True)
class Source:
    """What a parameter was made of."""

    name: str
    parameter: Any
    value: Pieces | Packed
    is_transposed: bool

    def is_held(self, whole: torch.Tensor) -> bool:
        """Whether the files, read and packed anew as a whole, give `whole`, which the workers hold, and its scales."""
        from bitsandbytes.functional import quantize_4bit

        held = getattr(self.parameter, "quant_state", None)
        if isinstance(self.value, Packed):
            return _is_same(whole, self.value.content.read()) and _has_scales(held, self.value.state(whole.device))
        stored = self.value.read().to(whole.device)
        if held is None:
            return _is_same(whole, stored.to(whole.dtype))
        packed, state = quantize_4bit(
            (stored.T if self.is_transposed else stored).to(held.dtype).contiguous(), blocksize=held.blocksize,
            compress_statistics=held.nested, quant_type=held.quant_type, quant_storage=torch.uint8,
        )  # fmt: skip
        return _is_same(whole, packed) and _has_scales(held, state)


@dataclass(frozen=True)
class Cache:
    """Weights that were packed before, and who writes those that are packed now."""

    weights: dict[str, Packed] = field(default_factory=dict)
    writer: Writer | None = None


def load_shares(
    model: ModelConfig, quantization: QuantizationConfig, compute_dtype: str, device: torch.device, keeper: Keeper,
    cache: Cache | None = None,
) -> tuple[PreTrainedModel, list[Source]]:  # fmt: skip
    """As load_base, of each weight this worker's share; and what can be read again. Every worker must call this.

    What an adapter reads or copies is left whole: modules_to_save, and both ends of the model for new tokens.
    """
    weights = lazily(files_of(model), f"model.base_model={model.base_model}")
    maker = _Maker(model, getattr(torch, compute_dtype), device, keeper, cache or Cache())
    with _making_parameters(weights, maker.set_parameter):
        base = load_base(model, quantization, compute_dtype, device)
    maker.staging.finish()
    return base, maker.sources


def files_of(model: ModelConfig) -> TensorFiles:
    """The files of a base as they are loaded. Raises ConfigError."""
    key = f"model.base_model={model.base_model}"
    folder = loadable_folder(local_folder(model.base_model, model.revision), key)
    return TensorFiles(safetensors_files(Path(folder), key), key)


class _Maker:
    """Makes each parameter when transformers has its value together."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device, keeper: Keeper, cache: Cache):
        self._model, self._dtype, self._device, self._keeper = model, dtype, device, keeper
        self._cache, self._has_begun, self.staging = cache, False, Staging(device)
        self.sources: list[Source] = []

    def set_parameter(
        self, model: Any, name: str, value: Any, found: Any, quantizer: Any, plain: Callable[..., None]
    ) -> None:
        """What core_model_loading.set_param_for_module does, which is `plain`."""
        if self._cache.writer and not self._has_begun:
            self._cache.writer.make_room([one for one, _ in model.named_parameters() if _is_packed(model, one)])
        self._has_begun = True
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters.get(attribute)
        if old is None:  # a buffer, or what the config switches off
            value = value.read() if isinstance(value, Pieces) else value
            return plain(model, name, value, found, quantizer)
        is_four_bit = _is_packed(model, name)
        is_transposed = isinstance(value, Pieces) and is_four_bit and _is_conv1d(module)
        shape = value.shape[::-1] if is_transposed else value.shape
        found.missing_keys.discard(name)
        if shape != old.shape or isinstance(value, Packed) and not is_four_bit:
            found.mismatched_keys.add((name, value.shape, old.shape))
            return None
        if self._stays_whole(model, name):
            made = torch.nn.Parameter(self._cut(value, 0, value.numel()).view(shape), requires_grad=False)
        else:
            twin = self._twin(model, name, value)
            made = self._make(name, module, value, is_transposed) if twin is None else twin
        made._is_hf_initialized = True  # type: ignore[attr-defined]
        module._parameters[attribute] = made
        return None

    def _make(self, name: str, module: Any, value: Any, is_transposed: bool) -> torch.nn.Parameter:
        old: Any = module._parameters[name.rpartition(".")[2]]
        if _is_to_be_packed(old):
            module._is_hf_initialized = True
            stored = self._cache.weights.get(name)
            parameter = self._four_bit(module, old, stored or (value.T if is_transposed else value))
            if self._cache.writer:
                self._cache.writer.add(name, self._keeper.whole(parameter), parameter.quant_state)
            self._keeper.keep_scales(parameter.quant_state)
        else:
            parameter = torch.nn.Parameter(self._nothing(value.shape, self._dtype), requires_grad=False)
            share, numel = self._keeper.share, value.numel()
            self._keeper.keep(parameter, share.padded(self._cut(value, *share.of(numel)), numel))
        if isinstance(value, Pieces | Packed):  # what was made of them is not kept
            self.sources.append(Source(name, parameter, value, is_transposed))
        return parameter

    def _four_bit(self, module: Any, old: Any, value: Any) -> Any:
        from bitsandbytes.nn import Linear4bit, Params4bit

        if isinstance(value, Packed):
            state, size = value.state(self._device), value.content.numel()
            ends = self._keeper.share.of(size)
            mine = self._keeper.share.padded(self.staging.cut(value.content, *ends), size)
        else:
            size = num_packed(value.numel())
            how = FourBit(old.quant_type, old.compress_statistics, old.blocksize)
            mine, scales = pack_share(lambda *ends: self._cut(value, *ends), value.numel(), self._keeper.share, how)
            self._keeper.take_largest(scales)
            state = state_of(scales, value.shape, self._dtype, how)
        layer = module if isinstance(module, Linear4bit) else None  # or a block of experts, of which this is a stack
        if layer is not None:
            layer.quant_state = state
        parameter = Params4bit(
            self._nothing(torch.Size((size, 1)), torch.uint8), quant_state=state, blocksize=state.blocksize,
            compress_statistics=state.nested, quant_type=state.quant_type, module=layer, bnb_quantized=True,
        )  # fmt: skip
        self._keeper.keep(parameter, mine)
        return parameter

    def _cut(self, value: Any, start: int, stop: int) -> torch.Tensor:
        part = self.staging.cut(value, start, stop) if isinstance(value, Pieces) else value.reshape(-1)[start:stop]
        return part.to(self._device, self._dtype)

    def _nothing(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((), dtype=dtype, device=self._device).expand(shape)

    def _twin(self, model: Any, name: str, value: Any) -> torch.nn.Parameter | None:
        """The parameter that this one is tied to, where the files hold both and they are the same; parts them if not.

        transformers would compare them when all is loaded, and shares tell it nothing.
        """
        tied = model.all_tied_weights_keys
        for target, source in list(tied.items()):
            other = next((one for one in self.sources if one.name in (target, source) and one.name != name), None)
            if name in (target, source) and other is not None:
                assert isinstance(value, Pieces), name
                ends = self._keeper.share.of(value.numel())
                is_same = value.shape == other.value.shape
                is_same = is_same and torch.equal(self._cut(value, *ends), self._cut(other.value, *ends))
                if self._keeper.is_everywhere(is_same):
                    return other.parameter
                del tied[target]
        return None

    def _stays_whole(self, model: Any, name: str) -> bool:
        parameter = model.get_parameter(name)
        if self._model.new_tokens and any(parameter is end for end in _ends_of(model)):
            return True
        modules = [".".join(name.split(".")[:count]) for count in range(1, name.count(".") + 1)]
        return any(module.endswith(entry) for module in modules for entry in self._model.modules_to_save)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(-1), other.to(one.device).view(-1))


def _has_scales(held: Any, wanted: Any) -> bool:
    pairs = [(held.absmax, wanted.absmax), (held.code, wanted.code)]
    if wanted.nested:
        pairs += [(held.offset, wanted.offset), (held.state2.absmax, wanted.state2.absmax)]
    return held.nested == wanted.nested and all(_is_same(one, other) for one, other in pairs)


def _ends_of(model: Any) -> list[torch.nn.Parameter]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end.weight for end in ends if end is not None]


def _is_packed(model: torch.nn.Module, name: str) -> bool:
    return _is_to_be_packed(model.get_parameter(name))


def _is_to_be_packed(parameter: torch.nn.Parameter | None) -> bool:
    from bitsandbytes.nn import Params4bit

    return isinstance(parameter, Params4bit)


def _is_conv1d(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return issubclass(module.source_cls, Conv1D)


class _Opened:
    """What safetensors.safe_open returns, of weights that are not read."""

    def __init__(self, weights: dict[str, Pieces | Packed]):
        self.keys, self.get_slice = weights.keys, weights.__getitem__

    def __exit__(self, *_: Any) -> None:
        pass


@contextmanager
def _making_parameters(weights: dict[str, Pieces | Packed], set_parameter: Callable[..., None]) -> Iterator[None]:
    """Have from_pretrained find these weights, leave each to `set_parameter`, and pack or reserve nothing itself."""
    from transformers import core_model_loading, modeling_utils
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class PassOn(core_model_loading.ConversionOps):
        def convert(self, input_dict: dict, *_: Any, **__: Any) -> dict:
            return input_dict

    plain = core_model_loading.set_param_for_module
    replaced = [
        (core_model_loading, "set_param_for_module", lambda *given: set_parameter(*given, plain)),
        (Bnb4BitHfQuantizer, "get_quantize_ops", lambda _: PassOn()),
        (modeling_utils, "safe_open", lambda *_, **__: _Opened(weights)),  # of each file: the same
        (modeling_utils, "_is_on_hf_mount", lambda _: False),  # where files would be read whole
        (modeling_utils, "caching_allocator_warmup", lambda *_: None),  # for the whole base
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, ours in replaced:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for owner, name, theirs in before:
            setattr(owner, name, theirs)
