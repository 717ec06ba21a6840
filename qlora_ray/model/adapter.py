"""The LoRA on the frozen base: built, saved and read back by parameter name."""

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qlora_ray.config import ModelConfig
from qlora_ray.errors import ConfigError
from qlora_ray.model.experts import expert_sizes, stacks_of, stand_ins
from qlora_ray.model.facts import left_out_of_all_linear
from qlora_ray.model.hub import local_folder
from qlora_ray.model.peft_names import as_modules, names_as_written
from qlora_ray.model.record import base_tensors
from qlora_ray.model.tensors import TensorFiles
from qlora_ray.model.token_rows import NewTokens, begin_rows, layers_with_rows, make_room

ADAPTER_NAME = "default"


def add_adapter(
    base: PreTrainedModel, model: ModelConfig, compute_dtype: torch.dtype, seed: int,
    new_tokens: NewTokens | None = None,
) -> PeftModel:  # fmt: skip
    """Wrap the base with a LoRA whose weights are in the compute dtype. The same seed gives the same A matrices.

    The rows of `new_tokens` are trained with it. Raises ConfigError where the settings do not fit the base.
    """
    torch.manual_seed(seed)
    adapted = wrap(base, model, new_tokens or {})
    begin_rows(adapted, new_tokens or {}, ADAPTER_NAME)
    if model.lora_variant == "loftq" and model.start_from is None:
        _start_from_quantization_error(adapted, local_folder(model.base_model, model.revision))
    for parameter in trainable(adapted).values():
        parameter.data = parameter.data.to(compute_dtype)
    return adapted


def wrap(
    base: PreTrainedModel, model: ModelConfig, new_tokens: NewTokens, low_cpu_mem_usage: bool = False
) -> PeftModel:
    """The base with PEFT's LoRA on it; with `low_cpu_mem_usage` on the meta device. Raises ConfigError."""
    experts = expert_settings(base, model) if model.expert_lora else {}
    rows = sorted(new_tokens)
    make_room(base, max(rows, default=-1) + 1)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it; a fraction is as good
        lora_dropout=model.lora_dropout,
        target_modules=model.target_modules,
        exclude_modules=_excluded(model, base.config.model_type),
        target_parameters=list(experts) or None,
        rank_pattern={**{re.escape(name): rank for name, (rank, _) in experts.items()}, **model.rank_pattern},
        alpha_pattern={**{re.escape(name): alpha for name, (_, alpha) in experts.items()}, **model.alpha_pattern},
        trainable_token_indices={name: rows for name in layers_with_rows(base)} if rows else None,
        modules_to_save=model.modules_to_save or None,
        use_rslora=model.lora_variant == "rslora",
        use_dora=model.lora_variant == "dora",
        revision=model.revision,
    )
    try:
        with names_as_written(), stand_ins(base):
            return get_peft_model(base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage)
    except ValueError as error:
        raise ConfigError(f"model.target_modules={model.target_modules}: {error}") from error


def expert_settings(base: PreTrainedModel, model: ModelConfig) -> dict[str, tuple[int, float]]:
    """Rank and lora_alpha of the stacks of experts, by the ends of their names. Raises ConfigError."""
    with stand_ins(base):  # a worker may hold a share of each stack
        sizes, names = expert_sizes(base, are_packed=True), list(stacks_of(base))
    if sizes is None or not names:
        raise ConfigError(
            f"model.expert_lora=true: {base.config.model_type} has no experts that compute by transformers' interface."
        )
    if model.lora_dropout or model.lora_variant in ("dora", "loftq"):
        key = f"lora_dropout={model.lora_dropout}" if model.lora_dropout else f"lora_variant={model.lora_variant}"
        raise ConfigError(f"model.{key}: PEFT has none on experts. Set model.expert_lora=false, or leave it out.")
    rank = max(1, model.lora_r // sizes.num_per_token)
    share = (rank / model.lora_r) ** (0.5 if model.lora_variant == "rslora" else 1)  # the same factor of B A
    return {".".join(name.split(".")[-2:]): (rank, model.lora_alpha * share) for name in names}


def load_adapter(base: PreTrainedModel, folder: str) -> PeftModel:
    """The base with an adapter's LoRA on it, in the dtype that it is stored in: that of training.

    Raises ValueError or RuntimeError where they do not fit.
    """
    config = as_modules(LoraConfig.from_pretrained(folder), base)
    with names_as_written(), stand_ins(base):
        return PeftModel.from_pretrained(base, folder, config=config, autocast_adapter_dtype=False)


def _excluded(model: ModelConfig, model_type: str) -> str | list[str] | None:
    left_out = left_out_of_all_linear(model_type) if model.target_modules == "all-linear" else ()
    if left_out and isinstance(model.exclude_modules, str):  # a regular expression of whole names
        return rf"{model.exclude_modules}|.*\.({'|'.join(left_out)})"
    return [*model.exclude_modules, *left_out] if left_out else model.exclude_modules or None


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _start_from_quantization_error(adapted: PeftModel, folder: str) -> None:
    """LoftQ (arXiv:2310.08659), one step: scaling x B A = best rank-r approximation of W - dequantize(W4)."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    weights = base_tensors(folder, f"model.base_model={folder}")
    is_transposed = adapted.config.model_type == "gpt2"  # Conv1D stores (columns, rows)
    for name, module in adapted.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        packed = module.get_base_layer().weight
        stored = _name_in(weights, name.removeprefix("base_model.model.") + ".weight")
        exact = weights.read(stored).to(packed.device, torch.float32)
        error = (exact.T if is_transposed else exact) - dequantize_4bit(packed.data, packed.quant_state).float()
        rank = module.r[ADAPTER_NAME]
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
        a.data[: len(root)] = root[:, None] * v[:rank]
        b.data[:, : len(root)] = u[:, :rank] * root / module.scaling[ADAPTER_NAME]


def _name_in(weights: TensorFiles, name: str) -> str:
    for stored in (name, name.removeprefix("transformer.").removeprefix("model.")):
        if stored in weights.entries:
            return stored
    raise ConfigError(f"model.lora_variant=loftq: the base's files have no weight {name}. Use lora.")
