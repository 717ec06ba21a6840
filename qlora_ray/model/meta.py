"""The model and the adapter that a run will build, on the meta device: true counts, and names that mean nothing."""

import copy
import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_ray.config import ModelConfig
from qlora_ray.errors import ConfigError
from qlora_ray.model import rope
from qlora_ray.model.adapter import ADAPTER_NAME, trainable, wrap
from qlora_ray.model.balance import routers_of
from qlora_ray.model.base import build_from_config, build_without_weights, count_parameters, packs_experts
from qlora_ray.model.experts import expert_sizes
from qlora_ray.model.facts import BaseFacts, ModelFacts, facts_of_config, left_out_of_all_linear, read_facts
from qlora_ray.model.peft_names import taken_for_experts
from qlora_ray.model.start import check_base, check_tensors, check_tokens, open_start
from qlora_ray.model.token_rows import NewTokens

SHOWN = 3


def model_facts(folder: str, model: ModelConfig, new_tokens: NewTokens) -> ModelFacts:
    """Sizes of the base and of the adapter on it, as they will be built.

    Raises ConfigError where the files do not fill the base, or an entry of the adapter's settings matches nothing.
    """
    facts = read_facts(folder)
    base = build_without_weights(folder, model.trust_remote_code, model.factory)
    return _facts_as_built(folder, facts, base, model, new_tokens)


def model_facts_of_config(folder: str, model: ModelConfig, new_tokens: NewTokens) -> ModelFacts:
    """The same of a folder that has its config.json and no weights. Raises ConfigError."""
    base = build_from_config(folder, model.trust_remote_code, model.factory)
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}  # of tied ones the first
    return _facts_as_built(folder, facts_of_config(folder, shapes), base, model, new_tokens)


def _facts_as_built(
    folder: str, facts: BaseFacts, base: PreTrainedModel, model: ModelConfig, new_tokens: NewTokens
) -> ModelFacts:
    rope.check(base, model)
    packed, all_of_them = count_parameters(copy.deepcopy(base), folder)
    names = layer_names(base)
    adapted = check_names(model, names, type(base).__name__)
    _check_ends(model, base, adapted)
    _check_variant(model, base, adapted)
    start = open_start(model)
    if start:
        check_tokens(start, new_tokens)
    wrapped = _wrap(base, model, new_tokens)
    if start:
        check_base(start, folder, model)
        check_tensors(start, _names_of_peft(wrapped), model)
    experts = expert_sizes(base, packs_experts(folder))
    context = rope.context_length(facts.context_length, model.rope_scaling)
    sizes = {
        "num_linear_parameters": packed, "num_parameters": all_of_them, "experts": experts, "context_length": context,
        "takes_rope_scaling": not rope.why_not(base, {"rope_type": "yarn", "factor": 2.0}),
    }  # fmt: skip
    return ModelFacts(
        **{**vars(facts), **sizes},
        num_trainable_parameters=sum(parameter.numel() for parameter in trainable(wrapped).values()),
        adapted_layers=_kinds(wrapped),
        whole_modules=dict(Counter(last_part(name) for name in names if _is_saved(name, model))),
        new_tokens=new_tokens,
        num_embedding_rows=_num_rows(base),
        has_balancing_loss=bool(routers_of(base)),
    )


def _check_ends(model: ModelConfig, base: PreTrainedModel, adapted: list[str]) -> None:
    """Raise ConfigError where embedding or output layer are trained whole, and something else hangs on them."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    whole = [name for name, module in base.named_modules() if module in (embedding, head) and _is_saved(name, model)]
    if whole and head is not None and head.weight is embedding.weight:
        raise ConfigError(
            f"model.modules_to_save: {whole[0]} is one matrix with another layer of the {type(base).__name__}, and "
            "PEFT would part them. Use model.new_tokens for rows of it, or name another base."
        )
    targeted = [name for name, module in base.named_modules() if module in (embedding, head) and name in adapted]
    if targeted and model.new_tokens:
        raise ConfigError(f"model.target_modules: {targeted[0]} gets a LoRA, and model.new_tokens trains its rows.")
    if whole and model.new_tokens:
        raise ConfigError(f"model.modules_to_save: {whole[0]} is trained whole, and model.new_tokens trains its rows.")


def _check_variant(model: ModelConfig, base: PreTrainedModel, adapted: list[str]) -> None:
    """Raise ConfigError where PEFT could not read the adapter: shared experts reach it as parameters, without DoRA."""
    beside = [name for name in adapted if last_part(name) in taken_for_experts(base.config.model_type)]
    if beside and model.lora_variant == "dora":
        raise ConfigError(
            f"model.lora_variant=dora: PEFT takes the name of {beside[0]} for an expert's in {base.config.model_type} "
            "models, and has no DoRA there. Use lora or rslora, or name target_modules without it."
        )


def layer_names(base: PreTrainedModel) -> dict[str, str]:
    """Names that target_modules may mean, and what they name.

    "linear" or "head", which a LoRA fits, "left out", a linear layer that PEFT does not adapt, or "other".
    """
    head, left_out = base.get_output_embeddings(), left_out_of_all_linear(base.config.model_type)
    names = {name: "other" for name, _ in base.named_modules() if name}
    for name, module in base.named_modules():
        if module is head:
            names[name] = "head"
        elif isinstance(module, torch.nn.Linear | Conv1D):
            names[name] = "left out" if name.endswith(left_out) else "linear"
    return names


def check_names(model: ModelConfig, names: dict[str, str], what: str) -> list[str]:
    """Names of the layers that are to get a LoRA; `what` names the model.

    Raises ConfigError for an entry of the adapter's settings that matches none.
    """
    linear = [name for name, kind in names.items() if kind in ("linear", "head")]
    _check_modules("target_modules", model.target_modules, names, linear, what)
    if _is_all_linear(model.target_modules):
        targeted = [name for name, kind in names.items() if kind == "linear"]
    else:
        targeted = [name for name in names if _matches(model.target_modules, name)]
    _check_modules("exclude_modules", model.exclude_modules, targeted, targeted, what)
    left = [name for name in targeted if not _matches(model.exclude_modules, name)]
    _check_whole(model, names, what)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(model, key):
            if not any(_has_pattern(pattern, name) for name in left):
                raise ConfigError(_no_match(key, pattern, left, what))
    return left


def _check_modules(key: str, wanted: str | list[str], names: Iterable[str], linear: list[str], what: str) -> None:
    if isinstance(wanted, list):
        for entry in wanted:
            if not any(_ends_with(name, entry) for name in names):
                raise ConfigError(_no_match(key, entry, linear, what))
    elif not (key == "target_modules" and _is_all_linear(wanted)):
        try:
            matched = any(re.fullmatch(wanted, name) for name in names)
        except re.error as error:
            raise ConfigError(f"model.{key}={wanted}: is not a regular expression: {error}.") from None
        if not matched:
            example = linear[0] if linear else next(iter(names), "")
            raise ConfigError(
                f"model.{key}={wanted}: a text is a regular expression of a layer's whole name, such as {example}, and "
                f"this one matches no layer of the {what}. Write a list, [{wanted}], to name layers by their ends."
            )


def _check_whole(model: ModelConfig, names: dict[str, str], what: str) -> None:
    others = [name for name, kind in names.items() if kind != "linear"]
    for entry in model.modules_to_save:
        found = [name for name in names if name.endswith(entry)]  # as PEFT
        if not found:
            near = difflib.get_close_matches(entry, {last_part(name) for name in others}, n=SHOWN, cutoff=0.5)
            nearest = f" Nearest: {', '.join(near)}." if near else ""
            raise ConfigError(f"model.modules_to_save={entry}: matches no module of the {what}.{nearest}")
        for name in found:
            packed = [one for one, kind in names.items() if kind in ("linear", "left out")]
            inside = next((one for one in packed if f"{one}.".startswith(f"{name}.")), None)
            if inside:
                raise ConfigError(
                    f"model.modules_to_save={entry}: {inside} is stored in 4 bits and cannot be trained whole. Give it "
                    "a LoRA of a high rank (model.rank_pattern); norms and the output layer can be trained whole."
                )


def _no_match(key: str, entry: str, linear: list[str], what: str) -> str:
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    near = difflib.get_close_matches(entry.rpartition(".")[2], kinds, n=SHOWN, cutoff=0.5)
    found = f"Nearest: {', '.join(near)}" if near else f"Layers that it may name: {', '.join(kinds)}"
    return f"model.{key}={entry}: matches no layer of the {what} that gets a LoRA. {found}."


def _is_all_linear(wanted: str | list[str]) -> bool:
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def _matches(wanted: str | list[str], name: str) -> bool:
    if isinstance(wanted, list):
        return any(_ends_with(name, entry) for entry in wanted)
    return re.fullmatch(wanted, name) is not None


def _is_saved(name: str, model: ModelConfig) -> bool:
    return any(name.endswith(entry) for entry in model.modules_to_save)


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _has_pattern(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None  # as peft.utils.other.get_pattern_key


def _wrap(base: PreTrainedModel, model: ModelConfig, new_tokens: NewTokens) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, on what the plan tells
        return wrap(base, model, new_tokens, low_cpu_mem_usage=True)


def _names_of_peft(adapted: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each trained tensor, by its name in an adapter's file."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    return {name: tuple(value.shape) for name, value in state.items()}


def _kinds(adapted: Any) -> dict[str, int]:
    """How many layers have a LoRA, by the last part of their names."""
    tuner = adapted.base_model
    names = [*tuner.targeted_module_names, *(n.removesuffix(".weight") for n in tuner.targeted_parameter_names)]
    return dict(Counter(map(last_part, names)))


def last_part(name: str) -> str:
    """Of a module's dotted name."""
    return name.rpartition(".")[2]


def _num_rows(base: PreTrainedModel) -> int:
    embedding = base.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", base.config.get_text_config().vocab_size))
