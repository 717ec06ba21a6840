"""How workers hold the base: each all of it, or its share of it; decided by bytes. Pure."""

from dataclasses import replace

from qlora_ray.config import Config
from qlora_ray.model.recompute import Keep
from qlora_ray.planning import memory
from qlora_ray.planning.memory import SHARE_OF_MEMORY, Sizes


def decide(config: Config, known: Sizes, num_tokens: int, worker_gib: float | None) -> tuple[Sizes, str]:
    """The sizes as the base will be held, for GPUs of so many GiB (None: not known, or CPUs); and why, where decided.

    Layers that keep the least must fit beside a whole base, while it loads too; the rest is for activations either way.
    """
    asked = config.deepspeed.share_base
    if known.offload != "none":
        return replace(known, shares_base=False), ""
    if known.stage != 3 or config.ray.max_workers == 1:
        return replace(known, shares_base=False), ""
    if asked != "auto":
        return replace(known, shares_base=asked == "world"), f"deepspeed.share_base={asked}"
    if worker_gib is None:
        return known, ""
    whole = replace(known, shares_base=False)
    room = SHARE_OF_MEMORY * min(worker_gib, config.training.memory_budget_gib or worker_gib)
    forecast = memory.memory_gib(whole, num_tokens, memory.all_layers(whole, Keep.HOST))
    need = max(memory.peak_gib(forecast), forecast["while_loading"])
    if need <= room:
        return whole, f"it takes {need:.1f} GiB with activations, of {room:.1f}"
    return known, f"all of it would take {need:.1f} GiB with activations, of {room:.1f}"


def shown(shares_base: bool, why: str) -> str:
    """The decision, for people; nothing where there was none to make."""
    return f"each worker holds {'its share' if shares_base else 'all'} of the base: {why}" if why else ""


def notes(config: Config, stage: int) -> list[str]:
    """What was asked for and means nothing here."""
    if config.deepspeed.share_base != "world" or (stage == 3 and config.ray.max_workers > 1):
        return []
    why = "one worker alone" if config.ray.max_workers == 1 else f"each worker at ZeRO stage {stage}"
    return [f"deepspeed.share_base=world: not used, {why} holds all of the base."]
