"""The LoRA on the frozen base: built, saved and read back by parameter name."""

import os

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
    initial: bool | str = "pissa_niter_4" if model.lora_variant == "pissa" else True
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.target_modules,
        use_rslora=model.lora_variant == "rslora",
        use_dora=model.lora_variant == "dora",
        init_lora_weights=initial,
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


def exported_name(name: str) -> str:
    """PEFT's name of a LoRA parameter in adapter_model.safetensors: without the adapter's own name."""
    name = name.removeprefix("module.")
    if f".{ADAPTER_NAME}.weight" in name and "lora_magnitude_vector" in name:
        return name.replace(f".{ADAPTER_NAME}.weight", "")  # as peft.utils.save_and_load does for DoRA
    return name.replace(f".{ADAPTER_NAME}.", ".")


def _start_from_quantization_error(adapted: PeftModel, folder: str) -> None:
    from peft import replace_lora_weights_loftq
    from transformers.pytorch_utils import Conv1D

    weights = os.path.join(folder, "model.safetensors")
    if not os.path.isfile(weights):
        raise ConfigError("model.lora_variant=loftq: needs a local base with a single model.safetensors. Use lora.")
    if adapted.config.model_type == "gpt2":
        raise ConfigError(f"model.lora_variant=loftq: PEFT's LoftQ does not know {Conv1D.__name__} layers. Use lora.")
    replace_lora_weights_loftq(adapted, model_path=weights)
