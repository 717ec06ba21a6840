"""How workers hold the base: each all of it, or its share of what a node or all hold; decided by bytes. Pure."""

from dataclasses import replace

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model.recompute import Keep
from qlora_ray.planning import memory
from qlora_ray.planning.memory import SHARE_OF_MEMORY, Sizes


def decide(
    config: Config, known: Sizes, num_tokens: int, worker_gib: float | None, num_of_node: int
) -> tuple[Sizes, str]:
    """The sizes as the base will be held, for GPUs of so many GiB (None: not known, or CPUs); and why, where decided.

    Layers that keep the least must fit beside what a worker holds, while it loads too; the rest is for activations
    either way. `num_of_node` is the fewest workers of a node. Raises ConfigError.
    """
    asked = config.deepspeed.share_base
    whole, by_node = replace(known, shares_base=False), replace(known, shares_base=True, num_of_node=num_of_node)
    if known.offload != "none":
        return whole, ""
    if known.stage != 3 or config.ray.max_workers == 1:
        why = f"the ZeRO stage is {known.stage}" if known.stage != 3 else "there is one worker"
        return whole, f"{why}, so deepspeed.share_base={asked} changes nothing" if asked in ("node", "world") else ""
    if asked == "node" and known.begins_whole:
        raise ConfigError(
            f"deepspeed.share_base=node: model.lora_variant={config.model.lora_variant} begins from whole weights, "
            "which ZeRO takes apart over all workers. Use world or replicate."
        )
    if asked != "auto":
        return {"replicate": whole, "node": by_node, "world": known}[asked], f"deepspeed.share_base={asked}"
    if worker_gib is None:
        return known, ""
    room = SHARE_OF_MEMORY * min(worker_gib, config.training.memory_budget_gib or worker_gib)
    need = _need(whole, num_tokens)
    if need <= room:
        return whole, f"it takes {need:.1f} GiB with activations, of {room:.1f}"
    why = f"all of it would take {need:.1f} GiB with activations, of {room:.1f}"
    is_parted = 1 < num_of_node < known.num_workers and not known.begins_whole
    return by_node if is_parted and _need(by_node, num_tokens) <= room else known, why


def _need(known: Sizes, num_tokens: int) -> float:
    forecast = memory.memory_gib(known, num_tokens, memory.all_layers(known, Keep.HOST))
    return max(memory.peak_gib(forecast), forecast["while_loading"])


def shown(shares_base: bool, is_by_node: bool, why: str) -> str:
    """The decision, for people; nothing where there was none to make."""
    holder = "each worker holds its share of what its node holds" if is_by_node else "each worker holds its share"
    return f"{holder if shares_base else 'each worker holds all'} of the base: {why}" if why else ""
