"""Rows that workers share (training.sequence_parallel): which bases can, what a worker holds and sends. Pure."""

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import ModelFacts
from qlora_ray.model.families import FAMILIES
from qlora_ray.model.recompute import LayerShape, PlainShape

PAD_TO_MULTIPLE_OF = 8  # keeps matrix units busy, and the number of different widths of rows small


def tokens_of_a_worker(config: Config, length: int) -> int:
    """Tokens that a worker holds of a row of this length: all, or its part with padding."""
    size = config.training.sequence_parallel
    return length if size == 1 else -(-length // (size * PAD_TO_MULTIPLE_OF)) * PAD_TO_MULTIPLE_OF


def refuse_sharing(config: Config, base: ModelFacts, layer: LayerShape | PlainShape, longest_row: int) -> None:
    """Raise ConfigError where workers shall share rows, and the base's layers would not attend to all of them."""
    size = config.training.sequence_parallel
    if size == 1:
        return
    key = f"training.sequence_parallel={size}"
    if why := _why_not(config, base, layer):
        raise ConfigError(f"{key}: only fused layers attend to rows that workers share, and {why}. Use 1.")
    heads = base.num_heads or 0
    if heads % size:
        fits = [count for count in range(1, size) if heads % count == 0][-1]
        raise ConfigError(
            f"{key}: each worker attends with as many heads, and the base has {heads}. Use a number that divides them, "
            f"such as {fits}."
        )
    limit = base.rope_limit
    if limit and longest_row > limit.num_tokens:
        raise ConfigError(
            f"{key}: rows of up to {longest_row:,} tokens, and the base's RoPE ({limit.kind}) changes beyond "
            f"{limit.num_tokens:,}, where a worker sees its own part alone. Use 1, or training.max_length="
            f"{limit.num_tokens}."
        )


def _why_not(config: Config, base: ModelFacts, layer: LayerShape | PlainShape) -> str:
    """Why not every LoRA lies in a fused layer, as far as can be known before one is built."""
    family = FAMILIES.get(base.model_type)
    if family is None:
        return f"those of {base.model_type} models are not (fused are {', '.join(FAMILIES)})"
    if base.experts:
        return f"those of mixtures of experts ({base.model_type}) attend to whole rows"
    if not family.rotates:
        return f"{base.model_type} models have learned positions, of whole rows"
    if config.quantization.type == "none":
        return "quantization.type=none leaves them to PEFT"
    if not isinstance(layer, LayerShape):
        return "model.lora_variant, model.lora_dropout or model.modules_to_save leave them to PEFT"
    beside = base.adapted_layers.keys() - {*family.qkv, family.out, *family.gate_up, family.down}
    if beside:
        return f"{', '.join(sorted(beside))} is adapted beside them (model.target_modules)"
    if max(base.adapted_layers.values(), default=0) < base.num_layers:
        return "some get no LoRA (model.target_modules, model.exclude_modules)"
    return ""


def exchanged_bytes(layer: LayerShape | PlainShape, num_layers: int, num_tokens: int) -> float:
    """What a worker sends of a micro-batch of so many tokens of its own, if all layers are computed again."""
    return num_layers * num_tokens * layer.exchanged_bytes if isinstance(layer, LayerShape) else 0.0


def shown_sharing(config: Config, layer: LayerShape | PlainShape, num_layers: int, length: int) -> str:
    """What a group of workers does with a row of this length, for people."""
    tokens = tokens_of_a_worker(config, length)
    sent = exchanged_bytes(layer, num_layers, tokens) / 2**20
    return (
        f"{config.training.sequence_parallel} workers hold each row, {tokens:,} of up to {length:,} tokens each; a "
        f"worker sends up to {sent:,.1f} MiB of q, k, v and their gradients a row"
    )
