"""Rows of embedding and output layer for new tokens: whether the base has room for them, and how they begin.

A row begins as the mean of the rows of the tokens that its text was before. Where the base has rows that no token of
the tokenizer uses, the first of these are taken; else embedding and output layer grow by as many as are needed.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_ray.errors import ConfigError

NewTokens = dict[int, list[int]]  # id of each, and the tokens that its text was before


def make_room(base: PreTrainedModel, num_rows: int) -> None:
    """Grow embedding and output layer to so many rows, where they have fewer: frozen, each the mean of all before."""
    embedding: Any = base.get_input_embeddings()
    before = embedding.weight.shape[0]
    if num_rows <= before:
        return
    base.resize_token_embeddings(num_rows, mean_resizing=False)
    layers: tuple[Any, ...] = (base.get_input_embeddings(), base.get_output_embeddings())
    for layer in layers:
        weight = layer.weight.requires_grad_(False).data
        weight[before:] = weight[:before].mean(0, dtype=torch.float32).to(weight.dtype)


def layers_with_rows(base: PreTrainedModel) -> list[str]:
    """Names of the embedding and, where it is another matrix, of the output layer.

    Raises ConfigError where rows of the base cannot be trained alone.
    """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    key, what = "model.new_tokens", type(base).__name__
    if not isinstance(embedding, torch.nn.Embedding) or not isinstance(head, torch.nn.Linear):
        raise ConfigError(f"{key}: the {what} keeps its tokens otherwise than in an embedding and an output layer.")
    if head.bias is not None:
        raise ConfigError(f"{key}: the output layer of the {what} has a bias, which PEFT leaves out. Use another base.")
    is_tied = head.weight is embedding.weight
    if is_tied != bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False)):
        raise ConfigError(f"{key}: tie_word_embeddings in the base's config.json is not what its files hold.")
    names = {id(module): name for name, module in base.named_modules()}
    return [names[id(embedding)]] if is_tied else [names[id(embedding)], names[id(head)]]


def begin_rows(adapted: Any, new_tokens: NewTokens, name: str) -> None:
    """Give the trained rows of the adapter of this name their first values."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers: list[Any] = [one for one in adapted.modules() if isinstance(one, TrainableTokensLayer)]
    for layer in layers:
        if not layer.tied_adapter:
            weight, rows = layer.get_base_layer().weight.data, layer.trainable_tokens_delta[name].data
            for place, token in enumerate(layer.token_indices[name]):
                pieces = new_tokens[token]
                rows[place] = (weight[pieces] if pieces else weight).mean(0, dtype=torch.float32).to(rows.dtype)
