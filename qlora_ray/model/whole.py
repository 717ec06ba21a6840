"""Whether a base's files fill the model that its config describes: every weight there, known and of its shape."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from qlora_ray.errors import ConfigError
from qlora_ray.model.architecture import build_empty
from qlora_ray.model.facts import BUFFERS, packed_weights, read_shapes

logger = getLogger(__name__)
SHOWN = 3  # names of each kind
# Towers and extra heads beside the text model, which some causal language models leave out on purpose.
BESIDE_THE_TEXT = re.compile(r"(^|[._])(vision|visual|image|audio|speech|multi_?modal|mm|mtp)([._]|$)")
WAY_OUT = "Download or copy it again, with the config.json that belongs to it."
HEAD = re.compile(r"(lm_head|embed_out)\.weight$")


def build_from_headers(folder: str, trust_remote_code: bool = False, factory: str | None = None) -> PreTrainedModel:
    """The model of a local folder without memory for weights, loaded as transformers would load it.

    Raises ConfigError where the files' names and shapes are not the model's.
    """
    key = f"model.base_model={folder}"
    with torch.device("meta"):
        empty: Any = build_empty(folder, trust_remote_code, factory)
        is_tied = bool(getattr(empty.config.get_text_config(), "tie_word_embeddings", False))
        turned = _turned_as_packed(empty, folder)
        shapes = read_shapes(folder, is_tied).items()
        weights = {name: torch.empty(shape[::-1] if name in turned else shape) for name, shape in shapes}
    try:
        with _silence():
            model, found = type(empty).from_pretrained(
                None, config=empty.config, state_dict=weights, device_map={"": "meta"}, dtype=torch.float32,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except RuntimeError as error:  # what merges or renames weights, as of experts, found them unlike each other
        raise ConfigError(f"{key}: its weights are not those of a {type(empty).__name__}: {error} {WAY_OUT}") from error
    refuse_unfilled(key, model, found)
    return model


def _turned_as_packed(model: PreTrainedModel, folder: str) -> set[str]:
    """Names of the weights that bitsandbytes turned when it packed them: those of GPT-2's kind of layer."""
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)]
    return {one for one in packed_weights(folder) if any(name.endswith(one) for name in names)} if names else set()


def refuse_unfilled(key: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise ConfigError for what from_pretrained found missing, unknown or of another shape; it goes on regardless.

    `found` is what output_loading_info=True returns; `key` names the model in the message.
    """
    beside = {name for name in found["unexpected_keys"] if BESIDE_THE_TEXT.search(name) or BUFFERS.search(name)}
    if beside:
        logger.info("%s: no weights of the text model, left out: %s", key, _some(beside))
    of_another_shape = {
        f"{name} {tuple(stored)} in place of {tuple(wanted)}" for name, stored, wanted in found["mismatched_keys"]
    }
    faults = [
        f"{what} {_some(names)}"
        for what, names in (
            ("without", found["missing_keys"]), ("of another shape", of_another_shape),
            ("not part of it", found["unexpected_keys"] - beside),
        )
        if names
    ]  # fmt: skip
    if faults:
        raise ConfigError(
            f"{key}: its files are not those of the {type(model).__name__} that its config.json describes: "
            f"{'; '.join(faults)}. {_way_out(found['missing_keys'])}"
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Neither transformers' progress bar nor its table of what is missing, which the error will name."""
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _way_out(missing: set[str]) -> str:
    if missing and all(HEAD.search(name) for name in missing):
        return (
            "It was saved without its output layer: save it with AutoModelForCausalLM, or, if that layer is the "
            "embedding's, set tie_word_embeddings to true in config.json."
        )
    return WAY_OUT


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return f"{shown} and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown
