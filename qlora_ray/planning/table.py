"""What fits on N GPUs of M GiB, and how fast: a table, in seconds and without a GPU."""

from dataclasses import dataclass

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model import host
from qlora_ray.model.facts import ModelFacts
from qlora_ray.model.recompute import Choice, Keep, Room, choose
from qlora_ray.planning import memory
from qlora_ray.planning.early import as_stored, facts_at_hand
from qlora_ray.planning.memory import GIB
from qlora_ray.planning.plan import may_hold_weights, shown_layers, zero_stage
from qlora_ray.planning.speed import speed_notes

BATCH_SIZES = (1, 2, 4, 8, 16)
SHARE_OF_MEMORY = 0.93  # the rest is the CUDA context and the allocator's


@dataclass(frozen=True)
class Worker:
    """What one worker has."""

    gib: float
    gpu: str
    host_gib: float  # for what layers park


def host_gib_here() -> float:
    """What this machine, or its container, has for what layers park."""
    return host.SHARE * host.available_bytes() / GIB


def answer(config: Config, worker: Worker) -> str:
    """The table: rows a forward pass against what is kept, peak GiB of a worker and tokens per second of all.

    Raises ConfigError where the base is neither a local folder nor in the hub's cache.
    """
    base, config = _facts(config), as_stored(config)
    known = memory.sizes(config, base, base.num_trainable_parameters, zero_stage(config), "bfloat16")
    gib, gpu = worker.gib, worker.gpu
    length, workers = config.training.max_length, config.ray.max_workers
    each = 2 if config.training.pairs else 1  # rows of tokens
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
        f"{'rows':>4}  {'peak GiB':>8}  {'host GiB':>8}  {'tokens/s':>9}  kept for backward",
    ]
    for rows in BATCH_SIZES:
        room = Room((SHARE_OF_MEMORY * gib - resident) * GIB, worker.host_gib * GIB, may_hold_weights(config))
        for choice in _choices(known, rows * each * length, room):
            parked = memory.host_gib(known, rows * each * length, choice)
            peak = memory.peak_gib(memory.memory_gib(known, rows * each * length, choice))
            speed = memory.tokens_per_second(known, length, choice, gpu)
            shown = f"{workers * speed:,.0f}" if speed else "-"
            fits = "" if peak <= SHARE_OF_MEMORY * gib and parked <= worker.host_gib else "  does not fit"
            lines.append(f"{rows:>4}  {peak:>8.2f}  {parked:>8.2f}  {shown:>9}  {choice}{fits}")
    lines += _longest_rows(known, each, worker)
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


def _longest_rows(known: memory.Sizes, each: int, worker: Worker) -> list[str]:
    """Of one row a pass, by where the layers' inputs lie, with the GiB of GPU and host that it takes."""
    lines = []
    for level, where in ((Keep.HOST, "on the host"), (Keep.INPUT, "on the GPU")):
        choice, length = memory.all_layers(known, level), 0
        for step in (2**bit for bit in range(23, 9, -1)):
            if _row_fits(known, choice, each * (length + step), worker):
                length += step
        of_row = known.of_rows(length)
        peak = memory.peak_gib(memory.memory_gib(of_row, each * length, choice))
        parked = memory.host_gib(of_row, each * length, choice)
        lines.append(
            f"longest row with the layers' inputs {where}: {length:,} tokens "
            f"({peak:.1f} GiB, and {parked:.1f} of {worker.host_gib:.1f} on the host)"
        )
    return lines


def _row_fits(known: memory.Sizes, choice: Choice, num_tokens: int, worker: Worker) -> bool:
    of_row = known.of_rows(num_tokens)
    peak = memory.peak_gib(memory.memory_gib(of_row, num_tokens, choice))
    return peak <= SHARE_OF_MEMORY * worker.gib and memory.host_gib(of_row, num_tokens, choice) <= worker.host_gib


def _choices(known: memory.Sizes, num_tokens: int, room: Room) -> list[Choice]:
    leanest = memory.all_layers(known, Keep.HOST)
    auto = choose(known.layer, len(leanest.levels), num_tokens, known.base.vocab_size, room)
    return [auto] if auto == leanest else [auto, leanest]
