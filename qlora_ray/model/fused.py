"""Puts the fused arithmetic under a PEFT model: module tree, parameter names and state dict stay as they are.

Stands on internals of transformers and PEFT: OWN_FORWARD and LORA_LAYERS.
"""

import logging
from collections import Counter
from functools import partial
from typing import Any

import torch

from qlora_ray.libraries import Patch
from qlora_ray.model.attention import added_mask, dense_mask
from qlora_ray.model.dropout import drop_of, probability_of
from qlora_ray.model.experts import blocks_around_experts
from qlora_ray.model.families import FAMILIES, PLAIN_HEADS, Family
from qlora_ray.model.head import make_head_return_nats
from qlora_ray.model.kept import Shared
from qlora_ray.model.layer import FusedLayer
from qlora_ray.model.member import Turn, member, why_not
from qlora_ray.model.mixture import RoutedLayer, experts_of
from qlora_ray.model.norm import norm_of
from qlora_ray.model.ops import ops_for
from qlora_ray.model.projection import LoraProjection, Single
from qlora_ray.model.recompute import Choice
from qlora_ray.model.routed import compute_in_4_bits
from qlora_ray.model.stash import HostStash
from qlora_ray.model.traits import ACTIVATIONS, activation_of, sight_of

GELU_IN_STEPS = ("NewGELUActivation", "FastGELUActivation")
FIRST_PLACE = 2**31  # of projections outside fused layers, in the masks of dropout
logger = logging.getLogger(__name__)

OWN_FORWARD = Patch(
    "transformers", "5.23.0", "forward of Llama-like decoder layers, of the last norm and of the head is replaced, and "
    "their submodules are read by name",
    gains="1.08 to 1.14 times the tokens per second of Unsloth (benchmarks/README.md)",
    delete_when="transformers' kernels interface takes a whole decoder layer with its backward",
)  # fmt: skip
LORA_LAYERS = Patch(
    "peft", "0.21.2", "reads r, scaling, lora_A, lora_B, lora_dropout, lora_variant, lora_magnitude_vector, merged and "
    "disable_adapters of lora.Linear4bit, and replaces its forward",
    gains="base and LoRA in one product; PEFT adds them in passes of their own",
    delete_when="PEFT offers a hook for the arithmetic of a layer",
)  # fmt: skip


def fuse(model: Any) -> str:
    """Fuse what can be fused, in place; log and return one line that says what was, and why the rest was not."""
    compute_in_4_bits(model)
    device = next(model.parameters()).device
    shared = Shared(HostStash(device) if device.type == "cuda" else None)
    reasons: Counter[str] = Counter()
    classes = {family.layer: family for family in FAMILIES.values()}
    layers = [module for module in model.modules() if type(module).__name__ in classes]
    fused, inside = [], set[int]()
    for index, layer in enumerate(layers):
        family = classes[type(layer).__name__]
        projections = _projections(layer, family)
        if any(map(why_not, projections)) or not any(map(_is_lora, projections)):
            continue  # told projection by projection
        why = _why_not_layer(layer, family)
        reasons.update(f"layer: {reason}" for reason in why)
        if not why:
            kind = RoutedLayer if _is_mixture(layer.mlp) else FusedLayer
            _fuse_layer(layer, kind(layer, family, index, shared))
            fused.append(layer)
            inside |= {id(part) for projection in projections for part in projection.modules()}
    _use_one_kernel_for_gelu(model)
    num_projections = 0
    for module in model.modules():
        if _is_lora(module) and id(module) not in inside and not hasattr(module, "parameter_name"):
            num_projections += _fuse_projection(module, num_projections, reasons)
    if fused and len(fused) == len(layers):
        _fuse_ends(model, fused[-1].fused)
    elif model.config.model_type in PLAIN_HEADS:
        _fuse_head(model, _NoLayer())
    line = f"fused: {len(fused)} decoder layers, {num_projections} other projections"
    if reasons:
        line += "; left to PEFT: " + ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    logger.info("%s", line)
    return line


def fused_layers(model: torch.nn.Module) -> list[FusedLayer]:
    """The fused decoder layers, first to last."""
    found = (getattr(module, "fused", None) for module in model.modules())
    return [fused for fused in found if isinstance(fused, FusedLayer)]


def is_fused(model: torch.nn.Module) -> bool:
    """Whether every LoRA of the model is inside a fused decoder layer."""
    inside = {id(part) for module in leaf_modules(model) for part in module.modules()}
    return bool(fused_layers(model)) and all(id(m) in inside for m in model.modules() if _is_lora(m))


def leaf_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that read the weights of their submodules without calling them: ZeRO-3 must gather each as one."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    experts = {id(module) for module in blocks_around_experts(model)}
    layers = [module for module in model.modules() if isinstance(module.__dict__.get("fused"), FusedLayer)]
    inside = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    return [
        m for m in model.modules()
        if id(m) not in inside and ("fused" in m.__dict__ or id(m) in experts or isinstance(m, TrainableTokensLayer))
    ]  # fmt: skip


def keep(model: torch.nn.Module, choice: Choice) -> None:
    """Set what each fused layer keeps for backward, and which hold their weights dequantized."""
    layers = fused_layers(model)
    for layer, level in zip(layers, choice.levels, strict=True):
        layer.keep = level
    for layer in layers[len(layers) - choice.num_holding_weights :]:
        layer.hold_weights()


def _is_lora(module: torch.nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _is_trained_whole(module: torch.nn.Module) -> bool:
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def _projections(layer: torch.nn.Module, family: Family) -> list[torch.nn.Module]:
    groups = family.projections[:2] if _is_mixture(layer.mlp) else family.projections
    return [layer.get_submodule(name) for names in groups for name in names]


def _is_mixture(mlp: Any) -> bool:
    return hasattr(mlp, "experts")


def _why_not_layer(layer: Any, family: Family) -> set[str]:
    """Why a layer cannot take the fused path, though its projections can."""
    attention, why = getattr(layer, family.attention), set()
    if hasattr(layer, "crossattention"):
        why.add("it attends to another sequence too")
    if getattr(attention, "reorder_and_upcast_attn", False):
        why.add("its attention computes scores in float32")
    if hasattr(attention, "sinks") and attention.attention_dropout:
        why.add("its attention has sinks and dropout")
    if _is_mixture(layer.mlp):
        why |= _why_not_mixture(layer.mlp)
    elif activation_of(layer.mlp) not in ACTIVATIONS:
        why.add(f"its MLP uses {activation_of(layer.mlp)}")
    if sight_of(attention).window == 0:
        why.add("its sliding window shows nothing")
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        why.add("its attention caps scores")
    if not getattr(attention, "is_causal", True):
        why.add("its attention is not causal")
    if any(map(_is_trained_whole, layer.modules())):
        why.add("a norm of it is trained")
    return why


def _why_not_mixture(block: Any) -> set[str]:
    why = set()
    if experts_of(block) is None:
        why.add("its experts are not in 4 bits")
    if getattr(block, "jitter_noise", 0):
        why.add("its router has noise")
    beside = [m for m in block.modules() if _is_lora(m) and not hasattr(m, "parameter_name")]
    why |= {f"beside its experts, {reason}" for reason in map(why_not, beside) if reason}
    return why


def _fuse_layer(layer: Any, fused: FusedLayer) -> None:
    plain = layer.forward
    adapter = next(lora for lora in fused.loras if lora is not None)

    def forward(hidden_states: torch.Tensor, *by_place: Any, **given: Any) -> torch.Tensor:
        given |= dict(zip(fused.family.by_place, by_place, strict=bool(by_place)))
        mask = given.get("attention_mask")
        is_other = any(given.get(name) is not None for name in ("past_key_values", "encoder_hidden_states"))
        mask_is_known = mask is None or mask.dim() == 4
        if is_other or not mask_is_known or adapter.disable_adapters or adapter.merged:
            assert fused.holders.row_group is None, "plain layers attend to what they are given, here a part of a row"
            if mask is not None and mask.dtype == torch.int32:
                num_rows, length, _ = hidden_states.shape
                mask = dense_mask(mask, num_rows, length, fused.sight)
                if fused.attention.config._attn_implementation == "eager":
                    mask = added_mask(mask, hidden_states, fused.sight)
                given["attention_mask"] = mask
            return plain(hidden_states, **given)
        return fused(hidden_states, given.get("position_embeddings"), mask)

    layer.fused, layer.forward = fused, forward


def _fuse_projection(module: Any, number: int, reasons: Counter[str]) -> int:
    reason = why_not(module)
    if reason:
        reasons[reason] += 1
        return 0
    single, plain = Single(member(module)), module.forward

    def forward(x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        if args or more or module.disable_adapters or module.merged or x.dtype != single.member.base.compute_dtype:
            return plain(x, *args, **more)
        drop = drop_of(probability_of(module), torch.initial_seed(), FIRST_PLACE + number)
        return LoraProjection.apply(x, single, Turn(drop), *single.parameters())

    module.fused, module.forward = single, forward
    return 1


def _use_one_kernel_for_gelu(model: torch.nn.Module) -> None:
    """The same function, of which transformers keeps four tensors for backward: torch's own keeps its input."""
    for module in model.modules():
        if type(module).__name__ in GELU_IN_STEPS:
            module.forward = partial(torch.nn.functional.gelu, approximate="tanh")


def _fuse_ends(model: Any, last: FusedLayer) -> None:
    """The final norm, and the head with its loss."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    norm = causal_lm.get_submodule(last.family.last_norm)
    causal_lm.takes_borders = True
    causal_lm.row_holders = last.holders
    if not _is_trained_whole(norm):
        norm.forward = lambda hidden: _LastNorm.apply(hidden, norm, last)
    _fuse_head(causal_lm, last if last.family.passes_rows else _NoLayer())


class _NoLayer:
    """Stands for the layer before a head where that always returns all rows."""

    places: torch.Tensor | None = None
    place_numbers: torch.Tensor | None = None


def _fuse_head(model: Any, last: Any) -> None:
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal_lm.get_output_embeddings()
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        make_head_return_nats(head, last, float(getattr(causal_lm.config, "logits_scaling", 1.0)))


class _LastNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, module, last: FusedLayer):
        x = hidden.reshape(-1, hidden.shape[-1])
        out = torch.empty_like(x)
        ops_for(x.device).norm_rows(x, None, norm_of(module, last.family), out)
        ctx.module, ctx.last = module, last
        ctx.save_for_backward(x)
        return out.view(hidden.shape)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        buffer = ctx.last.passed.buffer = x.new_empty(len(x), x.shape[1] + ctx.last.room)
        dx, flat = buffer[:, : x.shape[1]], grad.reshape(x.shape).contiguous()
        ops_for(x.device).norm_rows_backward(flat, x, norm_of(ctx.module, ctx.last.family), None, dx)
        return dx.view(grad.shape), None, None
