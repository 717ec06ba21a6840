"""The LoRA on the frozen base: built, saved and read back by parameter name."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qlora_ray.config import ConfigError, ModelConfig, base_model_path

ADAPTER_NAME = "default"


def add_adapter(base: PreTrainedModel, model: ModelConfig, compute_dtype: torch.dtype, seed: int) -> PeftModel:
    """Wrap the base with a LoRA whose weights are in the compute dtype. The same seed gives the same A matrices.

    Raises ConfigError where the target modules or the variant do not fit the base.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it; a fraction is as good
        lora_dropout=model.lora_dropout,
        target_modules=model.target_modules,
        use_rslora=model.lora_variant == "rslora",
        use_dora=model.lora_variant == "dora",
        revision=model.revision,
    )
    try:
        adapted = get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(f"model.target_modules={model.target_modules}: {error}") from error
    if model.lora_variant == "loftq":
        _start_from_quantization_error(adapted, base_model_path(model.base_model))
    for parameter in trainable(adapted).values():
        parameter.data = parameter.data.to(compute_dtype)
    return adapted


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _start_from_quantization_error(adapted: PeftModel, folder: str) -> None:
    """LoftQ (arXiv:2310.08659), one step: scaling x B A = best rank-r approximation of W - dequantize(W4)."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    weights = _Weights(folder)
    is_transposed = adapted.config.model_type == "gpt2"  # Conv1D stores (columns, rows)
    for name, module in adapted.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        packed = module.get_base_layer().weight
        exact = weights.read(name.removeprefix("base_model.model.") + ".weight").to(packed.device, torch.float32)
        error = (exact.T if is_transposed else exact) - dequantize_4bit(packed.data, packed.quant_state).float()
        rank = module.r[ADAPTER_NAME]
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = module.lora_A[ADAPTER_NAME].weight, module.lora_B[ADAPTER_NAME].weight
        a.data[: len(root)] = root[:, None] * v[:rank]
        b.data[:, : len(root)] = u[:, :rank] * root / module.scaling[ADAPTER_NAME]


class _Weights:
    """The unquantized weights of a local base, one at a time."""

    def __init__(self, folder: str):
        from safetensors import safe_open

        self._files = [safe_open(str(path), "pt") for path in sorted(Path(folder).glob("*.safetensors"))]
        self._home = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - safe_open has no iterator

    def read(self, name: str) -> torch.Tensor:
        stored = name if name in self._home else name.removeprefix("transformer.").removeprefix("model.")
        if stored not in self._home:
            raise ConfigError(f"model.lora_variant=loftq: the base's files have no weight {name}. Use lora.")
        return self._home[stored].get_tensor(stored)
