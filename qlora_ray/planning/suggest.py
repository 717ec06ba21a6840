"""First settings of a run, from what the base holds, how long the samples are, and what there is to train on.

Nothing here looks at a disk or a GPU; the plan says what each choice takes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_ray.config import Config, make_config
from qlora_ray.data.lengths import Lengths
from qlora_ray.data.stats import DataStats
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import ModelFacts
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.memory import SHARE_OF_MEMORY, peak_gib
from qlora_ray.planning.plan import Plan, make_plan
from qlora_ray.planning.rows import layout
from qlora_ray.planning.table import BATCH_SIZES

TOKENS_PER_PASS = {True: 8192, False: 1024}  # on a GPU or not; more is no faster
ROWS_PER_STEP = 16  # QLoRA, arXiv:2305.14314, table 9
STEPS_PER_EPOCH = 25  # at least, where there are rows enough
LARGE = 3e10  # parameters from which on half the learning rate is right: the same table
CPU_FLOPS = 5e10  # of two busy cores, measured with a Llama of 0.35 B
CPU_SECONDS = 900  # that more than one epoch may take on a CPU
EPOCHS = {2_000: 4, 20_000: 3, 100_000: 2}  # for so many records at most; one for more
FEWEST_TO_HOLD_OUT, MOST_TO_HOLD_OUT = 20, 1000  # records
LINES_PER_RUN = 50  # of metrics.jsonl, where the run is short
WIDE_ROW = 2048  # tokens: no row is wider for another reason than one long sample
STEP_OF_LENGTH = 32
SAMPLES_PER_ROW = 4
FULL = 0.97  # of packed rows
ANSWER_TOKENS = 256  # at most, of an answer at the end


@dataclass(frozen=True)
class Machine:
    """What there is to train on."""

    num_workers: int
    gib: float  # of each worker
    use_gpu: bool

    def __str__(self) -> str:
        if not self.use_gpu:
            return f"the CPU, {self.gib:.1f} GiB free"
        return f"{self.num_workers} x {self.gib:.4g} GiB"


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit, and what the plan makes of them."""

    config: Config
    values: dict[str, dict[str, Any]]  # what shall stand in the file
    plan: Plan
    lengths: Lengths
    num_cut: int  # of 100 samples

    @property
    def peak_gib(self) -> float:
        """The most that a worker holds, while loading or in training."""
        return _peak(self.plan)


def suggest(asked: dict[str, dict[str, Any]], base: ModelFacts, lengths: Lengths, machine: Machine) -> Suggestion:
    """The fastest settings that fit, around what is asked for. Raises ConfigError where none do."""
    least = None
    for length in _row_lengths(lengths, base, layout(make_config(asked), base).packing):
        for batch_size, recompute in _batches(length, machine):
            values = _values(asked, base, lengths, machine, (length, batch_size, recompute))
            config = make_config(values)
            plan = make_plan(config, _stats(config, base, lengths), base, _hardware(machine), None)
            if _peak(plan) <= SHARE_OF_MEMORY * machine.gib:
                cut = math.ceil(100 * float(np.mean(lengths.num_tokens > length)))
                return Suggestion(config, values, plan, lengths, 0 if lengths.is_raw_text else cut)
            least = plan
    assert least is not None
    raise ConfigError(_does_not_fit(asked, least, machine))


def _row_lengths(lengths: Lengths, base: ModelFacts, packed: bool) -> Iterator[int]:
    """Tokens of a row, best first: the longest sample where it is near the rest, else 99 of 100; then fewer.

    Packed rows hold several samples where there are enough: less of them stays empty.
    """
    usual, longest = lengths.percentile(99), lengths.percentile(100)
    wanted = longest if longest <= 1.5 * usual else usual
    if packed and lengths.num_records >= SAMPLES_PER_ROW * ROWS_PER_STEP * STEPS_PER_EPOCH:
        wanted = max(wanted, min(WIDE_ROW, SAMPLES_PER_ROW * round(lengths.num_tokens.mean())))
    if lengths.is_raw_text:
        wanted = min(wanted, WIDE_ROW)  # long texts are cut into windows
    context = base.context_length or wanted
    length = min(-(-max(wanted, STEP_OF_LENGTH) // STEP_OF_LENGTH) * STEP_OF_LENGTH, context)
    yield length
    shortest = STEP_OF_LENGTH if lengths.is_raw_text else lengths.percentile(50)
    while length * 3 // 4 >= shortest:
        length = length * 3 // 4
        yield length


def _batches(length: int, machine: Machine) -> Iterator[tuple[int, str]]:
    """(rows a forward pass, what is computed again), fastest first."""
    ways = ("auto",) if machine.use_gpu else ("auto", "all")  # on CPUs auto keeps everything
    for way in ways:
        for size in reversed(BATCH_SIZES):
            if size == 1 or size * length <= TOKENS_PER_PASS[machine.use_gpu]:
                yield size, way


def _values(
    asked: dict[str, dict[str, Any]], base: ModelFacts, lengths: Lengths, machine: Machine, rows: tuple[int, int, str]
) -> dict[str, dict[str, Any]]:
    length, most_rows, recompute = rows
    held = _validation_split(lengths.num_records)
    num_rows = _num_rows(lengths, length, layout(make_config(asked), base).packing) * (1 - held)
    per_step = _power_of_two(min(ROWS_PER_STEP, num_rows / STEPS_PER_EPOCH))
    batch_size = max(1, min(most_rows, per_step // machine.num_workers))
    accumulation = max(1, per_step // (batch_size * machine.num_workers))
    epochs = _num_epochs(base, lengths, machine)
    steps = max(1, round(epochs * num_rows / (batch_size * accumulation * machine.num_workers)))
    bad = lengths.bad_share if lengths.is_raw_text else _bad_share(lengths, length)
    return {
        "model": {**asked["model"], "lora_r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training": {
            "num_epochs": epochs, "batch_size": batch_size, "gradient_accumulation_steps": accumulation,
            "learning_rate": 1e-4 if base.num_parameters >= LARGE else 2e-4, "max_length": length,
            "recompute": recompute,
        },
        "data": {
            **asked["data"], "validation_split": held,
            **({"max_bad_fraction": min(1.0, round(bad + 0.01, 2))} if bad > 0.01 else {}),
        },
        "ray": {"num_workers": machine.num_workers},
        **({"logging": {"every_steps": max(1, steps // LINES_PER_RUN)}} if steps < 10 * LINES_PER_RUN else {}),
        "evaluation": _evaluation(lengths, base, held),
    }  # fmt: skip


def _num_epochs(base: ModelFacts, lengths: Lengths, machine: Machine) -> int:
    """The more, the fewer records; on a CPU as many as take a quarter of an hour, or one."""
    epochs = next((number for most, number in EPOCHS.items() if lengths.num_records <= most), 1)
    if machine.use_gpu:
        return epochs
    flops = 4.0 * base.num_parameters * lengths.num_records * float(lengths.num_tokens.mean())  # frozen weights: not 6
    return max(1, min(epochs, int(CPU_FLOPS * CPU_SECONDS / flops)))


def _bad_share(lengths: Lengths, length: int) -> float:
    """Of the records: those that cannot be used, and those whose prompt alone fills a row."""
    return lengths.bad_share + float(np.mean(lengths.first_label >= length))


def _evaluation(lengths: Lengths, base: ModelFacts, held: float) -> dict[str, int]:
    """Answers at the end: as long as nine of ten are, where the base's context has room for prompt and answer."""
    answers = int(np.percentile(lengths.num_tokens - lengths.last_answer, 90))
    room = (base.context_length or 1 << 30) - int(lengths.last_answer.max())
    if lengths.is_raw_text or not held or room < 1:
        return {"num_prompts": 0}
    return {"num_prompts": 8, "max_new_tokens": min(ANSWER_TOKENS, room, -(-answers // 16) * 16)}


def _validation_split(num_records: int) -> float:
    if num_records < FEWEST_TO_HOLD_OUT:
        return 0.0
    return 0.1 if num_records <= 10 * MOST_TO_HOLD_OUT else float(f"{MOST_TO_HOLD_OUT / num_records:.1g}")


def _num_rows(lengths: Lengths, length: int, packed: bool) -> float:
    """Rows of all records, held-out ones too."""
    kept = lengths.num_tokens if lengths.is_raw_text else np.minimum(lengths.num_tokens, length)
    of_all = lengths.num_records * (1 - lengths.bad_share)
    return of_all * float(kept.mean()) / (FULL * length) if packed or lengths.is_raw_text else of_all


def _stats(config: Config, base: ModelFacts, lengths: Lengths) -> DataStats:
    """What the rows will be, as far as the samples tell."""
    length, packed = config.training.max_length, layout(config, base).packing
    train = 1 - config.data.validation_split
    num_rows = _num_rows(lengths, length, packed)
    num_samples = round(train * lengths.num_records)
    return DataStats(
        fingerprint="", num_records=lengths.num_records, num_rejected=0, num_truncated=0,
        num_rows=max(1, round(train * num_rows)), num_validation_rows=round((1 - train) * num_rows),
        num_tokens=round(num_samples * float(np.minimum(lengths.num_tokens, length).mean())),
        num_label_tokens=round(num_samples * float(lengths.num_label_tokens.mean())), longest_row=length,
        num_samples=num_samples, packed=packed, max_length=length,
    )  # fmt: skip


def _hardware(machine: Machine) -> Hardware:
    gpu_gib = machine.gib if machine.use_gpu else None
    return Hardware(machine.num_workers, machine.num_workers if machine.use_gpu else 0, gpu_gib=gpu_gib)


def _peak(plan: Plan) -> float:
    forecast = plan.memory_forecast_gib
    return max(peak_gib(forecast), forecast["while_loading"])


def _power_of_two(number: float) -> int:
    return 1 << max(0, int(number).bit_length() - 1)


def _does_not_fit(asked: dict[str, dict[str, Any]], plan: Plan, machine: Machine) -> str:
    forecast = plan.memory_forecast_gib
    parts = ", ".join(f"{part.replace('_', ' ')} {value:.1f}" for part, value in forecast.items())
    loads = forecast["while_loading"] > SHARE_OF_MEMORY * machine.gib
    way_out = "every worker loads the whole base: use GPUs of more memory" if loads else "use more or larger GPUs"
    return (
        f"model.base_model={asked['model']['base_model']}: does not fit on {machine} even with one row of "
        f"{plan.tokens_per_micro_batch} tokens (GiB a worker: {parts}). Ask for others with --gpus N --gib M "
        f"({way_out}), or take a smaller base."
    )
