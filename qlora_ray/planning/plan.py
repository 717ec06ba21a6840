"""What will be done, derived once on the driver. Pure: no torch, no Ray, no I/O."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from qlora_ray.config import Config
from qlora_ray.data.stats import DataStats
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import ModelFacts
from qlora_ray.model.recompute import Choice, Keep, LayerShape, PlainShape, Room, choose
from qlora_ray.planning import deepspeed, holding, memory, offload
from qlora_ray.planning.deepspeed import zero_stage
from qlora_ray.planning.hardware import (
    Hardware,
    check_workers_fit,
    compute_dtype_of,
    fewest_of_a_node,
    resources_of_a_worker,
    uses_gpu,
)
from qlora_ray.planning.notes import notes_of
from qlora_ray.planning.offload import Passing
from qlora_ray.planning.recomputation import may_hold_weights, memory_forecast, recompute_of
from qlora_ray.planning.rows import accumulation_of, refuse_positions
from qlora_ray.planning.sharing import refuse_sharing, tokens_of_a_worker
from qlora_ray.planning.traffic import Traffic, traffic

STORAGE_FOR_THE_REST = 32 * 2**20  # logs, metrics, report, tokenizer files


@dataclass(frozen=True)
class Plan:
    """Everything derived from the config, the data and the hardware."""

    num_workers: int  # at most
    min_workers: int
    use_gpu: bool
    resources_per_worker: dict[str, float]
    compute_dtype: str
    zero_stage: int
    recompute: str  # all, none, or auto: layers keep what the worker's memory has room for
    micro_batch_size: int
    micro_batches_per_step: int  # of all workers together
    gradient_accumulation_steps: int  # of each group of workers, where all of num_workers are there
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    eval_every_steps: int | None
    checkpoint_every_steps: int
    num_trainable_parameters: int
    adapted_layers: dict[str, int]  # how many have a LoRA, by kind
    whole_modules: dict[str, int]  # how many are trained whole, by kind
    new_tokens: dict[int, list[int]]  # ids, and the tokens that their rows begin as the mean of
    four_bit_share: float  # of the base's parameters
    notes: tuple[str, ...]
    tokens_per_micro_batch: int  # of a worker, at most, padding included
    layer_shape: LayerShape | PlainShape  # of the decoder layers, fused or not
    may_hold_weights: bool  # whether these may keep dequantized weights between steps
    memory_forecast_gib: dict[str, float]  # per worker
    deepspeed: dict[str, Any]
    longest_sample: int  # in tokens
    shares_base: bool = False  # over the workers; else each holds all of it
    is_shared_by_node: bool = False  # over those of each node alone
    why_shared: str = ""  # or not
    passing: Passing | None = None  # the layers' weights, where they are offloaded
    traffic: Traffic | None = None  # of a step, where all of num_workers are there and more than one

    @property
    def global_batch_size(self) -> int:
        """Rows that one optimizer step reads, over all workers."""
        return self.micro_batch_size * self.micro_batches_per_step

    def as_dict(self) -> dict[str, Any]:
        """What plan.json holds."""
        return {**dataclasses.asdict(self), "global_batch_size": self.global_batch_size}


def make_plan(
    config: Config, data: DataStats, base: ModelFacts, hardware: Hardware, deepspeed_json: dict | None
) -> Plan:
    """Derive the plan. Raises ConfigError where several fields together ask for the impossible."""
    config = offload.taken_from_json(config, deepspeed_json)
    use_gpu = uses_gpu(config, hardware)
    if not use_gpu and config.quantization.compute_dtype == "float16":
        raise ConfigError(
            "quantization.compute_dtype=float16: loss scaling needs a GPU and the run is on CPUs. Use auto or float32."
        )
    refuse_positions(config, base, data)
    resources = resources_of_a_worker(config, use_gpu)
    check_workers_fit(config, resources, hardware)
    accumulation = accumulation_of(config)
    micro_batches = accumulation * config.num_row_groups
    steps_per_epoch = -(-data.num_rows // (micro_batches * config.training.batch_size))
    num_steps = config.training.max_steps or max(1, round(config.training.num_epochs * steps_per_epoch))
    compute_dtype = compute_dtype_of(config, use_gpu, hardware)
    stage = zero_stage(config)
    trainable = base.num_trainable_parameters
    quantized = base.num_packed_parameters if config.quantization.type != "none" else 0
    has_validation = data.num_validation_rows > 0
    longest = min(config.training.max_length * (2 if data.shares_prompts else 1), data.longest_row)
    of_worker = tokens_of_a_worker(config, longest)
    num_tokens = config.training.batch_size * data.rows_of_tokens * of_worker
    known, gpu_gib = memory.sizes(config, base, trainable, stage, compute_dtype), hardware.gpu_gib if use_gpu else None
    known = dataclasses.replace(known, use_gpu=use_gpu)
    if data.shares_prompts:
        known = dataclasses.replace(known, layer=known.layer.sharing_prompts())
    num_of_node = fewest_of_a_node(config.ray.min_workers, resources, hardware)
    known, why_shared = holding.decide(config, known.of_rows(of_worker), num_tokens, gpu_gib, num_of_node)
    refuse_sharing(config, base, known.layer, data.longest_row)
    recompute = recompute_of(config, use_gpu, known)
    plan = Plan(
        num_workers=config.ray.max_workers,
        min_workers=config.ray.min_workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        compute_dtype=compute_dtype,
        zero_stage=stage,
        recompute=recompute,
        micro_batch_size=config.training.batch_size,
        micro_batches_per_step=micro_batches,
        gradient_accumulation_steps=accumulation,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        warmup_steps=round(config.training.warmup_ratio * num_steps),
        eval_every_steps=(config.training.eval_every_steps or max(1, num_steps // 5)) if has_validation else None,
        checkpoint_every_steps=config.checkpoint.every_steps or min(200, max(1, num_steps // 10)),
        num_trainable_parameters=trainable,
        adapted_layers=base.adapted_layers,
        whole_modules=base.whole_modules,
        new_tokens=base.new_tokens,
        four_bit_share=quantized / base.num_parameters,
        notes=(*notes_of(config, base, data, steps_per_epoch, use_gpu), *offload.notes(deepspeed_json)),
        tokens_per_micro_batch=num_tokens,
        layer_shape=known.layer,
        may_hold_weights=may_hold_weights(config, known),
        memory_forecast_gib=memory_forecast(config, known, num_tokens, recompute, use_gpu),
        deepspeed=deepspeed.defaults(config, stage, accumulation, compute_dtype, trainable),
        longest_sample=min(config.training.max_length, data.longest_sample),
        shares_base=known.shares_base,
        is_shared_by_node=known.num_of_node is not None,
        why_shared=why_shared,
        passing=offload.passing(known, num_tokens, config.training.max_length, gpu_gib, gpu_of(hardware)),
        traffic=traffic(known, config.ray.max_workers, accumulation, num_tokens),
    )
    if not deepspeed_json:
        return plan
    merged = deepspeed.merge(deepspeed_json, plan.deepspeed, config.num_row_groups)
    return dataclasses.replace(plan, deepspeed=merged)


def storage_bytes(config: Config, num_trainable: int) -> int:
    """Bytes that a run writes at most: its checkpoints and one being written, two adapters, and a little for the rest.

    A checkpoint holds weight and two moments of each trained parameter in float32.
    """
    checkpoint = num_trainable * 12
    return (config.checkpoint.keep + 1) * checkpoint + 2 * num_trainable * 4 + STORAGE_FOR_THE_REST


def choose_recomputation(plan: Plan, num_layers: int, vocab_size: int, room: Room) -> Choice:
    """What the layers keep, given what activations may take of this worker's memory."""
    if plan.recompute != "auto":
        return Choice((Keep.ALL if plan.recompute == "none" else Keep.HOST,) * num_layers)
    tokens = plan.tokens_per_micro_batch
    room = dataclasses.replace(room, may_hold_weights=plan.may_hold_weights)
    return choose(plan.layer_shape, num_layers, tokens, vocab_size, room)


def gpu_of(hardware: Hardware) -> str:
    """The cluster's GPU, where its products' rate is known; else nothing."""
    return next((name for name in hardware.accelerator_types if name in memory.PRODUCT_FLOPS), "")


def shown_layers(of: ModelFacts | Plan) -> str:
    """How many layers of each kind are adapted, and what else is trained, for people."""
    parts = [", ".join(f"{count} {kind}" for kind, count in of.adapted_layers.items())]
    if of.whole_modules:
        parts.append("whole: " + ", ".join(f"{count} {kind}" for kind, count in of.whole_modules.items()))
    if of.new_tokens:
        parts.append(f"rows of {len(of.new_tokens)} new tokens")
    return "; ".join(parts)


def learning_rate_at(step: int, plan: Plan, config: Config) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warmup, then the schedule down to 0."""
    import math

    peak, schedule = config.training.learning_rate, config.training.lr_schedule
    if step < plan.warmup_steps:
        return peak * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.num_steps - plan.warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * max(0.0, 1 - done) if schedule == "linear" else peak
