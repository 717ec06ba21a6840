"""Tiny models three ways: fused, PEFT on bitsandbytes, and PEFT on the same weights dequantized, in float64."""

import re
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from qlora_ray.model.adapter import ADAPTER_NAME, add_adapter, trainable
from qlora_ray.model.base import load_base
from qlora_ray.model.dropout import Drop, drop_of, kept
from qlora_ray.model.experts import modules_of_stacks, stack_names
from qlora_ray.model.families import FAMILIES
from qlora_ray.model.fused import FIRST_PLACE, fuse
from qlora_ray.model.layer import OWN_PLACE
from qlora_ray.worker.loss import sum_of_nats
from tests.integration import tiny_models

# What the fields of a family's config say that differ from Llama's, at their least trivial.
SETTINGS: dict[str, dict] = {
    "ministral": {"head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 4.0,
        "vocab_size": 2051,  # no multiple of 8, as its 49,155
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "glm4": {"attention_bias": True},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"sliding_window": 9}, "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen2_moe": {"qkv_bias": True},
    "gpt_oss": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 0.5},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.7},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}  # fmt: skip
OWN_DROPOUT: dict[str, dict] = {  # of the base itself
    "gpt2": {"attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2},
    "phi3": {"resid_pdrop": 0.2},
    "granite": {"attention_dropout": 0.2},
}


def save(family: str, folder: Path) -> str:
    """A tiny model of a family with its settings, and with norms and biases that are not what they begin as."""
    from safetensors.torch import load_file, save_file

    tiny_models.save(family, folder, **SETTINGS.get(family, {}))
    file = folder / "model.safetensors"
    weights, generator = load_file(file), torch.Generator().manual_seed(2)
    for weight in (weight for weight in weights.values() if weight.dim() == 1):
        weight += 0.3 * torch.randn(weight.shape, generator=generator)
    # Else values are nearly their bias, attention nearly a mean, and what is left of gradients of q and k is rounding.
    for kind, factor in ((".v_proj.weight", 24), (".q_proj.weight", 4), (".k_proj.weight", 4)):
        for name in (name for name in weights if name.endswith(kind)):
            weights[name] *= factor
    save_file(weights, file, metadata={"format": "pt"})
    return str(folder)


def build(folder: Path | str, dtype: torch.dtype, device: str = "cpu", fused: bool = True, **model) -> PeftModel:
    """A 4-bit base with a LoRA whose B is not zero."""
    config = tiny_models.make_config(str(folder), model=model)
    base = load_base(config.model, config.quantization, str(dtype).removeprefix("torch."), torch.device(device))
    adapted = add_adapter(base, config.model, dtype, seed=0)
    for parameter in adapted.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(adapted).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if fused:
        fuse(adapted)
    return adapted.train()


def build_reference(folder: Path | str, device: str = "cpu", **model) -> PeftModel:
    """The float32 model of `build` with each 4-bit layer replaced by a dense one of the same values, in float64."""
    adapted = build(folder, torch.float32, device, fused=False, **model)
    unpack_experts(adapted)
    for parent in list(adapted.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear4bit):
                dense = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                dense.weight, dense.bias = torch.nn.Parameter(values, requires_grad=False), layer.bias
                setattr(parent, name, dense)
    return adapted.double()


def unpack_experts(model: PeftModel) -> None:
    """Have experts compute as transformers' own loop does, on dense stacks of the same values."""
    model.config._experts_implementation = "eager"
    for module in modules_of_stacks(model).values():
        for name in stack_names(module):
            packed = module.get_parameter(name)
            values = dequantize_4bit(packed.data, packed.quant_state)
            module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
        module.__dict__.pop("forward", None)


def with_masks_of_fused(
    model: PeftModel, probability: float, seed: int, places: torch.Tensor | None = None
) -> PeftModel:
    """Give each LoRA outside fused layers the mask that its group would have in a fused layer, and each layer's own
    dropout, but that of attention.

    `places` are the rows that the last layer is asked for.
    """
    family, num_beside = FAMILIES[model.config.model_type], 0
    for name, module in model.named_modules():
        found = re.fullmatch(r".*\.(\d+)\.(.*?)(\.lora_dropout)?", name)
        if not found:
            continue
        layer, part, of_lora = int(found[1]), found[2], found[3]
        is_last = layer == model.config.num_hidden_layers - 1
        if of_lora and "shared_expert" in name:  # beside experts
            drop = drop_of(probability, seed, FIRST_PLACE + num_beside)
            module[ADAPTER_NAME], num_beside = GivenMask(drop, places if is_last else None), num_beside + 1
        elif of_lora:
            group = next(i for i, names in enumerate(family.projections) if part in names)
            drop = drop_of(probability, seed, 4 * layer + group)
            module[ADAPTER_NAME] = GivenMask(drop, places if is_last and group > 0 else None)
        elif part in family.drops and module.p:
            drop = drop_of(module.p, seed, OWN_PLACE + 2 * layer + family.drops.index(part))
            model.set_submodule(name, GivenMask(drop, places if is_last else None))
    return model


def with_a_mask_each(model: PeftModel, probability: float, seed: int) -> PeftModel:
    """Give each LoRA the mask that it would have as a fused projection of its own."""
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for number, module in enumerate(lora):
        module.lora_dropout[ADAPTER_NAME] = GivenMask(drop_of(probability, seed, FIRST_PLACE + number))
    return model


class GivenMask(torch.nn.Module):
    """Dropout with a mask of model/dropout.py."""

    def __init__(self, drop: Drop, places: torch.Tensor | None = None):
        super().__init__()
        self._drop, self._places = drop, places

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        keep = torch.ones(flat.shape, dtype=torch.bool, device=x.device)
        places = slice(None) if self._places is None else self._places.to(x.device)  # only they have a mask
        keep[places] = kept(len(keep[places]), flat.shape[1], self._drop, x.device)
        return torch.where(keep.view(x.shape), x * self._drop.scale, 0)


def nats_and_gradients(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of nats of a batch, and the gradient of each LoRA matrix, in float64."""
    device = next(model.parameters()).device
    nats = sum_of_nats(model, {name: values.to(device) for name, values in batch.items()})
    nats.backward()
    gradients = {name: parameter.grad.double() for name, parameter in trainable(model).items()}
    model.zero_grad()
    return float(nats.detach()), gradients


def error(gradients: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Largest relative error of a matrix: |g - exact| / |exact|."""
    return max(float((gradients[name] - exact[name]).norm() / exact[name].norm()) for name in exact)


def rounding(model: PeftModel, reference: PeftModel) -> float:
    """Relative errors of all gradients together, over four batches: of one, a few small gradients would decide."""
    total = 0.0
    for seed in range(4):
        exact, made = (nats_and_gradients(one, tiny_models.batch(seed))[1] for one in (reference, model))
        total += sum(float((made[name] - exact[name]).norm() / exact[name].norm()) ** 2 for name in exact)
    return total**0.5


def packed_batch() -> dict[str, torch.Tensor]:
    """Two rows of 24 tokens: samples of 7, 12 and 5, and of 20 with padding."""
    batch = {name: values for name, values in tiny_models.batch().items() if name != "attention_mask"}
    lengths = ((7, 12, 5), (20, 4))
    batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    batch["sample_borders"] = torch.tensor([0, 7, 19, 24, 44, 48], dtype=torch.int32)
    batch["labels"][batch["position_ids"] == 0] = -100
    batch["labels"][1, 20:] = -100
    return batch


def with_places(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch that says which places predict a token that is trained on."""
    predicts = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    return {**batch, "label_places": predicts.flatten().nonzero()[:, 0]}


def alone(model: PeftModel, packed: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """`nats_and_gradients` of a packed batch, from each of its samples in a row of its own."""
    nats, gradients, borders = 0.0, {}, packed["sample_borders"].tolist()
    for start, end in zip(borders, borders[1:], strict=False):
        one = {name: packed[name].reshape(1, -1)[:, start:end] for name in ("input_ids", "labels")}
        if (one["labels"][:, 1:] == -100).all():
            continue
        its_nats, some = nats_and_gradients(model, one)
        nats += its_nats
        gradients = {name: gradients.get(name, 0) + value for name, value in some.items()}
    return nats, gradients
