"""An adapter's settings for mixtures of experts: as PEFT is to follow them, and as it is to read them later.

PEFT takes gate_proj, up_proj, down_proj and others of some model types for the experts' of older files, wherever they
stand. Training passes that by. Shared experts and dense layers of such models are written as `target_parameters`,
which PEFT takes as they are: their tensors' names are the same.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig

from qlora_ray.libraries import Patch

TAKEN_AS_WRITTEN = Patch(
    "peft", "0.21.2", "convert_peft_config_for_transformers does nothing while a LoRA is put on a base; "
    "_MODEL_TO_CONVERSION_PATTERN and _MOE_TARGET_MODULE_MAPPING tell which names it takes for experts'",
    gains="shared experts get a LoRA, experts and router none",
    delete_when="PEFT tells shared experts and dense layers from experts",
)  # fmt: skip
WEIGHT = ".weight"


@contextmanager
def names_as_written() -> Iterator[None]:
    """Within, PEFT takes target_modules for the names of modules."""
    from peft.utils import transformers_weight_conversion as conversion

    plain = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *arguments, **more: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = plain


def taken_for_experts(model_type: str) -> set[str]:
    """Last parts of names that PEFT takes for experts' and routers'."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def for_plain_peft(model: Any, adapter_name: str) -> LoraConfig:
    """The settings of an adapted model as plain PEFT gets the same model of them, on a base whose weights are dense."""
    config = model.peft_config[adapter_name]
    taken = taken_for_experts(model.config.model_type)
    names = sorted(model.base_model.targeted_module_names)
    beside = [name for name in names if name.rpartition(".")[2] in taken]
    written = copy.deepcopy(config)
    if isinstance(config.target_modules, str) and taken:
        written.target_modules = [name for name in names if name not in beside]
    if not beside:
        return written
    if not isinstance(config.target_modules, str):
        written.target_modules = [
            name for name in sorted(config.target_modules or ()) if name.rpartition(".")[2] not in taken
        ]
    written.target_parameters = sorted({*(config.target_parameters or ()), *(name + WEIGHT for name in beside)})
    written.lora_dropout = 0.0  # which PEFT refuses for parameters, and which has no effect once trained
    for patterns in (written.rank_pattern, written.alpha_pattern):
        patterns.update({rf"({pattern})\{WEIGHT}": value for pattern, value in patterns.items()})
    return written


def as_modules(config: LoraConfig, base: torch.nn.Module) -> LoraConfig:
    """The inverse of `for_plain_peft`: linear layers among the parameters are modules again."""
    linear = {name + WEIGHT for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    beside = {name for name in config.target_parameters or () if name in linear}
    if not beside:
        return config
    read = copy.deepcopy(config)
    assert not isinstance(config.target_modules, str)
    read.target_modules = sorted({*(config.target_modules or ()), *(name.removesuffix(WEIGHT) for name in beside)})
    read.target_parameters = sorted(set(config.target_parameters or ()) - beside) or None
    return read
