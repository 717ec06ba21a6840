"""What fits on N GPUs of M GiB, and how fast: a table, in seconds and without a GPU."""

import math

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model import host
from qlora_ray.model.facts import ModelFacts
from qlora_ray.model.recompute import LONG_ROW, Choice, Keep, Room, RoutedShape, choose
from qlora_ray.planning import holding, memory, offload
from qlora_ray.planning.deepspeed import zero_stage
from qlora_ray.planning.early import as_stored, planned_facts
from qlora_ray.planning.memory import GIB, SHARE_OF_MEMORY
from qlora_ray.planning.plan import shown_layers
from qlora_ray.planning.recomputation import may_hold_weights
from qlora_ray.planning.rows import accumulation_of
from qlora_ray.planning.sharing import refuse_sharing, shown_sharing, tokens_of_a_worker
from qlora_ray.planning.speed import speed_notes
from qlora_ray.planning.traffic import traffic

BATCH_SIZES = (1, 2, 4, 8, 16)


def host_gib_here() -> float:
    """What this machine, or its container, has for what layers park."""
    return host.SHARE * host.available_bytes() / GIB


def answer(config: Config, gib: float, gpu: str, host_gib: float = math.inf) -> str:
    """The table: rows a forward pass against what is kept, peak GiB of a worker and tokens per second of all.

    `host_gib` is what a worker's layers may park on the host.

    A folder needs no weights, its config.json is enough.

    Raises ConfigError where the base is neither a local folder nor in the hub's cache.
    """
    base, config = _facts(config), as_stored(config)
    length, workers = config.training.max_length, config.ray.max_workers
    of_worker, is_shared = tokens_of_a_worker(config, length), config.training.sequence_parallel > 1
    each = 2 if config.training.prefers else 1  # rows of tokens
    known = memory.sizes(config, base, base.num_trainable_parameters, zero_stage(config), "bfloat16")
    num_tokens = config.training.batch_size * each * of_worker
    known, why_shared = holding.decide(config, known, num_tokens, gib, workers)  # on one node: others are not known
    refuse_sharing(config, base, known.layer, length)
    row = f"{each} x {length}" if each > 1 else f"{length}"
    resident = sum(memory.resident_gib(known).values())
    loading = memory.loading_gib(known)
    moved = traffic(known, workers, accumulation_of(config), num_tokens)
    active = f" ({shown_count(base.num_active_parameters)} for a token)" if base.experts else ""
    lines = [
        f"{config.model.base_model}: {shown_count(base.num_parameters)} parameters{active}, "
        f"LoRA r={config.model.lora_r}, rows of {row} tokens, ZeRO stage {known.stage}, "
        f"{workers} x {gib:g} GiB ({gpu})",
        f"{base.num_trainable_parameters:,} parameters trained, in {shown_layers(base)}",
        f"weights and optimizer {resident:.2f} GiB a worker, "
        f"{loading:.2f} while loading{'' if loading <= SHARE_OF_MEMORY * gib else ': does not fit'}",
        *([shown_sharing(config, known.layer, base.num_layers, length)] if is_shared else []),
        *([f"{moved}, with {config.training.batch_size} a forward pass"] if moved else []),
        f"{'rows':>4}  {'peak GiB':>8}  {'tokens/s':>9}  kept for backward",
    ]
    lines[2:2] = filter(None, [holding.shown(known.shares_base, known.num_of_node is not None, why_shared)])
    if passing := offload.passing(known, num_tokens, length, gib, gpu):
        lines.insert(2, f"base on {'disk' if passing.disk_bytes else 'host'}: {passing}")
    is_unknown = False
    for rows in BATCH_SIZES:
        room = Room((SHARE_OF_MEMORY * gib - resident) * GIB, host_gib * GIB, may_hold_weights(config, known))
        for choice in _choices(known, rows * each * of_worker, room):
            peak = memory.peak_gib(memory.memory_gib(known, rows * each * of_worker, choice))
            speed = memory.tokens_per_second(known, rows * each * of_worker, length, choice, gpu)
            shown = f"{workers * speed:,.0f}" if speed else "-"
            is_unknown |= speed is None
            parked = memory.host_gib(known, rows * each * of_worker, choice)
            on_host = f" ({parked:.1f} GiB on the host)" if of_worker > LONG_ROW else ""
            fits = "" if peak <= SHARE_OF_MEMORY * gib and parked <= host_gib else "  does not fit"
            lines.append(f"{rows:>4}  {peak:>8.2f}  {shown:>9}  {choice}{on_host}{fits}")
    lines += _longest_rows(known, each, config.training.sequence_parallel, gib, host_gib)
    if not _fits(known, each * of_worker, gib) and (way_out := _what_fits(config, base, gib)):
        lines.append(f"one row fits with {way_out}")
    if is_unknown and base.experts and not isinstance(known.layer, RoutedShape):
        lines.append("tokens/s is not told of experts in 16 bits, and of those whose layers are not fused")
    elif is_unknown and gpu in memory.PRODUCT_FLOPS:
        lines.append("tokens/s is not told where layers are so small that launching them takes longer than their work")
    return "\n".join([*lines, *(f"note: {note}" for note in speed_notes(config, base))])


def shown_count(number: int) -> str:
    """Of parameters, for people."""
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.1f} M"


def _longest_rows(known: memory.Sizes, each: int, parts: int, gib: float, host_gib: float) -> list[str]:
    """Of one row a pass, with and without host memory, with the GiB of GPU and host that it takes."""
    lines = []
    for where, most in (("longest row", host_gib), ("longest row with nothing on the host", 0.0)):
        length, taken = 0, (0.0, 0.0)
        for step in (2**bit for bit in range(23, 9, -1)):
            peak, parked = _leanest(known.of_rows(length + step), each * (length + step), most)
            if peak <= SHARE_OF_MEMORY * gib and parked <= most:
                length, taken = length + step, (peak, parked)
        on_host = f", and {taken[1]:.1f} of {most:.1f} on the host" if most else ""
        lines.append(f"{where}: {length * parts:,} tokens ({taken[0]:.1f} GiB{on_host})")
    return lines


def _leanest(known: memory.Sizes, num_tokens: int, host_gib: float) -> tuple[float, float]:
    """GiB of GPU and host with the layers' inputs on the host, as far as it has room, and the others' on the GPU."""
    num_layers, room = max(1, known.base.num_layers), Room(0, host_gib * GIB)
    choice = choose(known.layer, num_layers, num_tokens, known.base.vocab_size, room)
    return memory.peak_gib(memory.memory_gib(known, num_tokens, choice)), memory.host_gib(known, num_tokens, choice)


def _fits(known: memory.Sizes, num_tokens: int, gib: float) -> bool:
    """Whether a micro-batch does, while loading too, where layers keep the least."""
    forecast = memory.memory_gib(known, num_tokens, memory.all_layers(known, Keep.HOST))
    return max(memory.peak_gib(forecast), forecast["while_loading"]) <= SHARE_OF_MEMORY * gib


def _what_fits(config: Config, base: ModelFacts, gib: float) -> str | None:
    """The first setting, cheapest first, with which one row fits; None where none does."""
    each = 2 if config.training.prefers else 1
    for told in ({"share_base": "world"}, {"offload_params": "cpu", "share_base": "auto"}):
        asked = config.deepspeed.model_copy(update={"zero_stage": 3, **told})
        other = config.model_copy(update={"deepspeed": asked})
        known = memory.sizes(other, base, base.num_trainable_parameters, 3, "bfloat16")
        is_refused = known.begins_whole and known.offload != "none"
        if not is_refused and _fits(known, each * tokens_of_a_worker(config, config.training.max_length), gib):
            return " ".join(f"deepspeed.{key}={value}" for key, value in told.items() if value != "auto")
    return None


def _facts(config: Config) -> ModelFacts:
    base = config.model.base_model
    facts = planned_facts(config)
    if facts is None:
        raise ConfigError(
            f"model.base_model={base}: no such folder, and not in the hub's cache; plan reads sizes from "
            f"the files and downloads nothing. Run `hf download {base}` first, or name a local folder: config.json is "
            "enough."
        )
    return facts


def _choices(known: memory.Sizes, num_tokens: int, room: Room) -> list[Choice]:
    leanest = memory.all_layers(known, Keep.HOST)
    auto = choose(known.layer, len(leanest.levels), num_tokens, known.base.vocab_size, room)
    return [auto] if auto == leanest else [auto, leanest]
