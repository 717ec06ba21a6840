"""Which class a base is built with: transformers' own, one of the folder's code, or what model.factory makes."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_ray.errors import ConfigError

NOT_CAUSAL = (
    "it is no causal language model: its tokens see those that come after them, or are read by an encoder. Name a "
    "decoder, e.g. a model whose card says ForCausalLM."
)
TOWERS = ("vision_config", "audio_config", "image_config", "speech_config")
TOWER = re.compile(r"(^|[._])(vision|visual|image|audio|speech)(_|\.|$)")


def config_of(folder: str, trust_remote_code: bool = False, factory: str | None = None) -> Any:
    """The config of a base, for a factory as one of no family. Raises ConfigError."""
    if factory:
        return PreTrainedConfig.from_json_file(os.path.join(folder, "config.json"))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"model.base_model={folder}: transformers {version('transformers')} cannot read its config.json: "
            f"{_first_line(error)} Install a version that knows it, or name a function that builds it: model.factory."
        ) from error
    _refuse_what_sees_the_future(folder, config)
    return config


def dense_config(folder: str, trust_remote_code: bool = False, factory: str | None = None) -> Any:
    """The same without a word of quantization: of packed weights the shapes are known, as if unpacked."""
    config = config_of(folder, trust_remote_code, factory)
    config.__dict__.pop("quantization_config", None)
    return config


def build_empty(folder: str, trust_remote_code: bool = False, factory: str | None = None) -> PreTrainedModel:
    """The model of a folder without its weights, on torch's default device. Raises ConfigError."""
    config = dense_config(folder, trust_remote_code, factory)
    if factory:
        return _make(factory, config)
    has_towers = any(getattr(config, name, None) for name in TOWERS)
    try:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        is_other = "Unrecognized configuration class" in str(error)
        why = f"cannot be built from its config.json: {_first_line(error)}"
        why = _no_text_model(config) if has_towers else NOT_CAUSAL if is_other else why
        raise ConfigError(f"model.base_model={folder}: {why}") from error
    if has_towers and any(TOWER.search(name) for name, _ in model.named_modules()):
        raise ConfigError(f"model.base_model={folder}: {_no_text_model(config)}")
    return model


def load_filled(folder: str, trust_remote_code: bool, factory: str | None, **how: Any) -> tuple[Any, dict[str, Any]]:
    """The model with its weights, and what from_pretrained found missing or unknown; `how` as it takes it."""
    how |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # else it raises without their names
    loaded: Any
    if factory:
        import torch

        with torch.device("meta"):
            empty = build_empty(folder, factory=factory)
        loaded = type(empty).from_pretrained(folder, config=empty.config, use_safetensors=True, **how)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust_remote_code, use_safetensors=True, **how
        )
    model, found = loaded
    return model, found


def _make(factory: str, config: PreTrainedConfig) -> PreTrainedModel:
    made = _load_function(factory)(config)
    if not isinstance(made, PreTrainedModel):
        raise ConfigError(f"model.factory={factory}: returned a {type(made).__name__}; must be a PreTrainedModel.")
    return made


def _load_function(name: str) -> Callable[[PreTrainedConfig], Any]:
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:  # a console script's path lacks it, `python -m`'s has it
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise ConfigError(f"model.factory={name}: cannot be imported: {error}.") from error
    if not callable(function):
        raise ConfigError(f"model.factory={name}: {module_name} has no function {function_name}.")
    return function


def _refuse_what_sees_the_future(folder: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder
    if getattr(config, "is_encoder_decoder", False) or is_masked or getattr(config, "attn_type", None) == "bi":
        raise ConfigError(f"model.base_model={folder}: {config.model_type}: {NOT_CAUSAL}")


def _no_text_model(config: Any) -> str:
    return (
        f"{config.model_type} has vision or audio parts beside its text model, and only text is trained on here. Save "
        "the text model as a folder of its own (docs/bases.md), or name the family's text-only model."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."
