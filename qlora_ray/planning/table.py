"""What fits on N GPUs of M GiB, and how fast: a table, in seconds and without a GPU."""

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import ModelFacts
from qlora_ray.model.recompute import Choice, Keep, choose
from qlora_ray.planning import memory
from qlora_ray.planning.early import as_stored, facts_at_hand
from qlora_ray.planning.memory import GIB
from qlora_ray.planning.plan import may_hold_weights, shown_layers, zero_stage
from qlora_ray.planning.speed import speed_notes

BATCH_SIZES = (1, 2, 4, 8, 16)
SHARE_OF_MEMORY = 0.93  # the rest is the CUDA context and the allocator's


def answer(config: Config, gib: float, gpu: str) -> str:
    """The table: rows a forward pass against what is kept, peak GiB of a worker and tokens per second of all.

    Raises ConfigError where the base is neither a local folder nor in the hub's cache.
    """
    base, config = _facts(config), as_stored(config)
    known = memory.sizes(config, base, base.num_trainable_parameters, zero_stage(config), "bfloat16")
    length, workers = config.training.max_length, config.ray.max_workers
    each = 2 if config.training.prefers else 1  # rows of tokens
    row = f"{each} x {length}" if each > 1 else f"{length}"
    resident = sum(memory.resident_gib(known).values())
    loading = memory.loading_gib(known)
    active = f" ({base.num_active_parameters / 1e9:.2f} B for a token)" if base.experts else ""
    lines = [
        f"{config.model.base_model}: {base.num_parameters / 1e9:.2f} B parameters{active}, "
        f"LoRA r={config.model.lora_r}, rows of {row} tokens, ZeRO stage {known.stage}, "
        f"{workers} x {gib:g} GiB ({gpu})",
        f"{base.num_trainable_parameters:,} parameters trained, in {shown_layers(base)}",
        f"weights and optimizer {resident:.2f} GiB a worker, "
        f"{loading:.2f} while loading{'' if loading <= SHARE_OF_MEMORY * gib else ': does not fit'}",
        f"{'rows':>4}  {'peak GiB':>8}  {'tokens/s':>9}  kept for backward",
    ]
    for rows in BATCH_SIZES:
        room = (SHARE_OF_MEMORY * gib - resident) * GIB
        for choice in _choices(known, rows * each * length, room, may_hold_weights(config)):
            peak = memory.peak_gib(memory.memory_gib(known, rows * each * length, choice))
            speed = memory.tokens_per_second(known, length, choice, gpu)
            shown = f"{workers * speed:,.0f}" if speed else "-"
            fits = "" if peak <= SHARE_OF_MEMORY * gib else "  does not fit"
            lines.append(f"{rows:>4}  {peak:>8.2f}  {shown:>9}  {choice}{fits}")
    return "\n".join([*lines, *(f"note: {note}" for note in speed_notes(config, base))])


def _facts(config: Config) -> ModelFacts:
    base = config.model.base_model
    facts = facts_at_hand(config)
    if facts is None:
        raise ConfigError(
            f"model.base_model={base}: no such folder, and not in the hub's cache; plan reads sizes from "
            f"the files and downloads nothing. Run `hf download {base}` first, or name a local folder."
        )
    return facts


def _choices(known: memory.Sizes, num_tokens: int, room: float, may_hold: bool) -> list[Choice]:
    leanest = memory.all_layers(known, Keep.HOST)
    auto = choose(known.layer, len(leanest.levels), num_tokens, known.base.vocab_size, room, may_hold)
    return [auto] if auto == leanest else [auto, leanest]
