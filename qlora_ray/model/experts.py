"""Which experts of a mixture can be packed in 4 bits, and their packing while transformers loads them, stack by stack.

A stack is one projection of all experts of a layer, one parameter: (E, N, K), or (E, K, N) where it lies transposed. It
is packed as bitsandbytes packs a weight of that many values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_ray.libraries import Patch
from qlora_ray.model import mxfp4
from qlora_ray.model.facts import ExpertSizes
from qlora_ray.model.ops_plain import Clamp

STACKS_TOO = Patch(
    "transformers", "5.23.0", "AUTO_QUANTIZER_MAPPING's bitsandbytes_4bit is a subclass while a base is loaded; marks "
    "of use_experts_implementation (has_gate, has_bias, is_transposed, _apply_gate) tell stacks of experts",
    gains="experts in 4 bits, 95% of many models: Bnb4BitHfQuantizer packs layers alone",
    delete_when="transformers packs experts in bitsandbytes' 4 bits (bitsandbytes' Experts4bit, pull request 1965)",
)  # fmt: skip
SILU = ("SiLU", "SiLUActivation")


def stack_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of a module's stacks, in the order in which tokens pass them; none where it cannot be packed.

    Known by what transformers' use_experts_implementation leaves: experts that it does not mark compute otherwise.
    """
    is_marked = hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate")
    if not is_marked or getattr(module, "has_post_expert_norm", False):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def gate(module: Any, up: torch.Tensor) -> torch.Tensor:
    """What experts do between their projections: (S, 2 I) -> (S, I), or without a gate (S, I) -> (S, I)."""
    return module._apply_gate(up) if module.has_gate else module.act_fn(up)


def has_silu(module: Any) -> bool:
    """Whether that is SiLU(first half) x second half."""
    is_plain = module.has_gate and type(module)._apply_gate.__name__ == "_default_apply_gate"
    return is_plain and type(module.act_fn).__name__ in SILU


def clamp_of(module: Any) -> Clamp | None:
    """That of gpt_oss's gate; None of another gate."""
    is_clamped = module.has_gate and type(module).__name__ == "GptOssExperts"
    return Clamp(float(module.alpha), float(module.limit)) if is_clamped else None


def modules_of_stacks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules that hold stacks which can be packed, by name."""
    return {name: module for name, module in model.named_modules() if stack_names(module)}


def stacks_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The stacks that can be packed, by name."""
    blocks = modules_of_stacks(model).items()
    return {f"{name}.{stack}": module.get_parameter(stack) for name, module in blocks for stack in stack_names(module)}


@contextmanager
def stand_ins(model: torch.nn.Module) -> Iterator[None]:
    """Within, packed stacks have the shape and dtype of what they stand for, for PEFT to read; and no values."""
    places = [(module, name) for module in modules_of_stacks(model).values() for name in stack_names(module)]
    packed: list[Any] = [module.get_parameter(name) for module, name in places]
    for (module, name), stack in zip(places, packed, strict=True):
        if hasattr(stack, "quant_state"):
            shape, dtype = stack.quant_state.shape, stack.quant_state.dtype
            empty = torch.empty(1, dtype=dtype, device=stack.device).expand(shape)
            module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
    try:
        yield
    finally:
        for (module, name), stack in zip(places, packed, strict=True):
            module._parameters[name] = stack


def blocks_around_experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that hold router, packed experts, and what else reads a layer's tokens with them."""
    found = [module for module in model.modules() if any(is_packed(unwrapped(child)) for child in module.children())]
    return [module for module in found if unwrapped(module) is module]  # not PEFT's wrappers, which nest


def unwrapped(module: Any) -> torch.nn.Module:
    """A module, taken out of what PEFT has wrapped it in."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def expert_sizes(model: Any, are_packed: bool) -> ExpertSizes | None:
    """Sizes of the experts of a model, also of those that cannot be packed; None where it has none.

    `are_packed` tells whether those that can be will be.
    """
    known = {id(stack) for stack in stacks_of(model).values()}
    stacks = [p for name, p in model.named_parameters() if id(p) in known or (p.dim() == 3 and ".experts." in name)]
    text = model.config.get_text_config()
    if not stacks:
        return None
    up, down = stacks[:2]
    hidden, num_per_token = int(text.hidden_size), getattr(text, "num_experts_per_tok", None) or len(down)
    return ExpertSizes(
        num_experts=len(down), num_per_token=int(num_per_token), hidden=hidden,
        up=up[0].numel() // hidden, inner=down[0].numel() // hidden, num_layers=len(stacks) // 2,
        num_parameters=sum(stack.numel() for stack in stacks),
        num_packed=sum(stack.numel() for stack in stacks if are_packed and id(stack) in known),
        has_bias=any(getattr(module, "has_bias", False) for module in modules_of_stacks(model).values()),
    )  # fmt: skip


def is_packed(module: torch.nn.Module) -> bool:
    """Whether a module's stacks are in 4 bits."""
    names = stack_names(module)
    return bool(names) and all(hasattr(getattr(module, name, None), "quant_state") for name in names)


def packed_stacks(model: torch.nn.Module) -> list[str]:
    """Names of the stacks of a loaded base that are in 4 bits, also where PEFT has wrapped them."""
    names = [name for name, stack in stacks_of(model).items() if hasattr(stack, "quant_state")]
    return sorted(name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names)


def misshapen_stacks(model: torch.nn.Module) -> set[tuple[str, torch.Size, torch.Size]]:
    """Packed stacks that are not of as many experts as the config says: name, shape, shape that it should have.

    transformers does not look at the shape of what is packed while it loads.
    """
    found = set()
    for owner, module in modules_of_stacks(model).items():
        for name in stack_names(module):
            state = getattr(module._parameters[name], "quant_state", None)
            if state is not None and state.shape[0] != module.num_experts:
                wanted = torch.Size((int(module.num_experts), *state.shape[1:]))  # type: ignore[arg-type]
                found.add((f"{owner}.{name}", state.shape, wanted))
    return found


def to_be_packed(stack: torch.Tensor, quantization: Any) -> torch.nn.Parameter:
    """A stack as a parameter that packs itself on its way to a device, as `quantization` (BitsAndBytesConfig) says."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(
        stack.data, requires_grad=False, quant_type=quantization.bnb_4bit_quant_type,
        compress_statistics=quantization.bnb_4bit_use_double_quant, quant_storage=quantization.bnb_4bit_quant_storage,
    )  # fmt: skip


def pack(module: torch.nn.Module, quantization: Any) -> None:
    """Pack the stacks of one module where they lie, one after the other."""
    for name in stack_names(module):
        stack = module._parameters.pop(name)
        assert stack is not None
        module._parameters[name] = to_be_packed(stack, quantization).to(stack.device)  # type: ignore[assignment]


def make_room(model: torch.nn.Module, quantization: Any) -> None:
    """Put parameters that will pack themselves in the places of all stacks of a model without weights."""
    for module in modules_of_stacks(model).values():
        module.source_cls = torch.nn.Linear  # type: ignore[assignment] # asked by Bnb4bitQuantize: not transposed
        for name in stack_names(module):
            module._parameters[name] = to_be_packed(module.get_parameter(name), quantization)


@contextmanager
def packed_while_loading(is_mxfp4: bool) -> Iterator[None]:
    """Within, transformers packs stacks of experts as it packs linear layers, each as soon as it has been read."""
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class WithExperts(Bnb4BitHfQuantizer):
        def _process_model_before_weight_loading(self, model, device_map, **more):  # type: ignore[override]
            super()._process_model_before_weight_loading(model, device_map, **more)
            if not self.pre_quantized:
                make_room(model, self.quantization_config)

        def param_needs_quantization(self, model, param_name, **more):
            owner, _, name = param_name.rpartition(".")
            is_stack = name in stack_names(model.get_submodule(owner))
            return is_stack or super().param_needs_quantization(model, param_name, **more)

        def get_weight_conversions(self):
            return [*super().get_weight_conversions(), *(mxfp4.conversions(self) if is_mxfp4 else ())]

    plain = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = WithExperts
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = plain
