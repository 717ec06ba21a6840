"""What the layers keep for backward where the plan decides it, and the memory that this takes."""

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model.recompute import Keep, PlainShape, Room, choose
from qlora_ray.planning import memory
from qlora_ray.planning.memory import GIB, Sizes


def may_hold_weights(config: Config, known: Sizes) -> bool:
    """Whether fused layers may keep their weights dequantized between steps, where there is room.

    Where workers share the base, each holding all of it would undo that. DoRA changes their lengths at each step.
    """
    is_there = config.model.lora_variant != "dora" and known.offload == "none"
    return is_there and config.training.dequantized_weights == "auto" and not known.shares_base


def recompute_of(config: Config, use_gpu: bool, known: Sizes) -> str:
    """all, none or auto, as Plan.recompute has it. Raises ConfigError where what was asked for cannot be."""
    asked = config.training.recompute
    passes = known.offload != "none" and isinstance(known.layer, PlainShape)
    if passes and asked == "none":
        raise ConfigError(
            f"training.recompute=none: with deepspeed.offload_params={known.offload} layers of {known.base.model_type} "
            "models are computed again, when their weights are there. Use auto or all."
        )
    if asked == "auto" and not use_gpu:
        return "all" if passes else "none"
    return asked


def memory_forecast(
    config: Config, known: Sizes, num_tokens: int, recompute: str, use_gpu: bool
) -> dict[str, float]:  # fmt: skip
    """GiB a worker, by part; where the memory at hand will decide, within training.memory_budget_gib or the leanest."""
    leanest = Keep.HOST if use_gpu else Keep.INPUT
    level = {"none": Keep.ALL, "all": leanest, "auto": leanest}[recompute]
    choice = memory.all_layers(known, level)
    if recompute == "auto" and config.training.memory_budget_gib:
        left = config.training.memory_budget_gib * GIB - sum(memory.resident_gib(known).values()) * GIB
        room = Room(left, may_hold_weights=may_hold_weights(config, known))
        choice = choose(known.layer, len(choice.levels), num_tokens, known.base.vocab_size, room)
    return memory.memory_gib(known, num_tokens, choice)
