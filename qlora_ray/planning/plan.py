"""What will be done, derived once on the driver. Pure: no torch, no Ray, no I/O."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from qlora_ray.config import Config
from qlora_ray.data.stats import DataStats, Layout
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import BaseFacts, ModelFacts, left_out_of_all_linear
from qlora_ray.model.recompute import Choice, Keep, LayerShape, PlainShape, Room, choose
from qlora_ray.planning import deepspeed, holding, memory, offload
from qlora_ray.planning.memory import GIB, Sizes
from qlora_ray.planning.offload import Passing
from qlora_ray.planning.sharing import PAD_TO_MULTIPLE_OF, refuse_sharing, tokens_of_a_worker
from qlora_ray.planning.speed import speed_notes

STORAGE_FOR_THE_REST = 32 * 2**20  # logs, metrics, report, tokenizer files
# Ray's accelerator labels of GPUs without bfloat16 matrix units (compute capability below 8.0).
GPUS_WITHOUT_BFLOAT16 = {"K80", "P4", "P100", "P40", "V100", "T4", "RTX-2080"}
# Model types whose attention stays within each sample of a packed row when position_ids restart there: logits and
# gradients are those of the samples alone (tests/integration/test_packing.py). Others get padded rows.
PACKED_MODEL_TYPES = {
    "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3",
    "gpt2", "gpt_neox", "olmo2", "granite", "glm4", "smollm3",
}  # fmt: skip
FEW_STEPS = 10  # an epoch of fewer is worth a word


@dataclass(frozen=True)
class Hardware:
    """What the cluster can give: totals over its nodes."""

    num_cpus: float
    num_gpus: float
    accelerator_types: tuple[str, ...] = ()
    other_resources: dict[str, float] = field(default_factory=dict)
    nodes: tuple[dict[str, float], ...] = ()  # resources of each: a worker lives on one
    gpu_gib: float | None = None  # of the smallest GPU, where the nodes were asked


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
    why_shared: str = ""  # or not
    passing: Passing | None = None  # the layers' weights, where they are offloaded

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
    _refuse_positions(config, base, data)
    resources = resources_of_a_worker(config, use_gpu)
    check_workers_fit(config, resources, hardware)
    accumulation = accumulation_of(config)
    micro_batches = accumulation * config.num_row_groups
    steps_per_epoch = -(-data.num_rows // (micro_batches * config.training.batch_size))
    num_steps = config.training.max_steps or max(1, round(config.training.num_epochs * steps_per_epoch))
    compute_dtype = _compute_dtype(config, use_gpu, hardware)
    stage = zero_stage(config)
    trainable = base.num_trainable_parameters
    quantized = base.num_packed_parameters if config.quantization.type != "none" else 0
    has_validation = data.num_validation_rows > 0
    longest = min(config.training.max_length * (2 if data.shares_prompts else 1), data.longest_row)
    of_worker = tokens_of_a_worker(config, longest)
    num_tokens = config.training.batch_size * data.rows_of_tokens * of_worker
    known, gpu_gib = memory.sizes(config, base, trainable, stage, compute_dtype), hardware.gpu_gib if use_gpu else None
    if data.shares_prompts:
        known = dataclasses.replace(known, layer=known.layer.sharing_prompts())
    known, why_shared = holding.decide(config, known.of_rows(of_worker), num_tokens, gpu_gib)
    refuse_sharing(config, base, known.layer, data.longest_row)
    recompute = _recompute(config, use_gpu, known)
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
        notes=(*_notes(config, base, data, steps_per_epoch, use_gpu), *offload.notes(deepspeed_json)),
        tokens_per_micro_batch=num_tokens,
        layer_shape=known.layer,
        may_hold_weights=may_hold_weights(config, known),
        memory_forecast_gib=_memory_forecast(config, known, num_tokens, recompute, use_gpu),
        deepspeed=deepspeed.defaults(config, stage, accumulation, compute_dtype, trainable),
        longest_sample=min(config.training.max_length, data.longest_sample),
        shares_base=known.shares_base,
        why_shared=why_shared,
        passing=offload.passing(known, num_tokens, config.training.max_length, gpu_gib, _gpu_of(hardware)),
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


def _rope_depends_on_rows(config: Config, base: BaseFacts) -> bool:
    return base.rope_limit is not None and config.training.max_length > base.rope_limit.num_tokens


def _refuse_positions(config: Config, base: BaseFacts, data: DataStats) -> None:
    """Refuse rows that the base has no positions for, or of which a batch is not the sum of its samples.

    Raises ConfigError.
    """
    training, limit = config.training, base.rope_limit
    width = -(-data.longest_sample // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
    if base.num_positions and width > base.num_positions:
        one = "sample" if data.shares_prompts else "row"
        fits = base.num_positions // PAD_TO_MULTIPLE_OF * PAD_TO_MULTIPLE_OF
        raise ConfigError(
            f"training.max_length={training.max_length}: the longest {one} has {data.longest_sample:,} tokens, and the "
            f"base has learned {base.num_positions:,} positions. Use training.max_length={fits}."
        )
    if limit is None or data.longest_sample <= limit.num_tokens:
        return
    why = (
        f"rows of up to {data.longest_sample:,} tokens, and the base's RoPE ({limit.kind}) changes with the longest "
        f"row beyond {limit.num_tokens:,}"
    )
    if limit.kind == "dynamic":
        raise ConfigError(
            f"training.max_length={training.max_length}: {why}, of those before it too: a resumed run would not "
            f"have its bits. Use training.max_length={limit.num_tokens}."
        )
    if training.batch_size > 1:
        raise ConfigError(
            f"training.batch_size={training.batch_size}: {why}: a long row would change the others of its batch. Use "
            f"training.batch_size=1 with more gradient_accumulation_steps, or training.max_length={limit.num_tokens}."
        )


def layout(config: Config, base: BaseFacts) -> Layout:
    """What a row holds: several samples, and both answers of a pair, where asked for and attention keeps them apart."""
    training = config.training
    can = _keeps_apart(config, base)
    return Layout(training.packing and can, training.records == "pairs" and training.share_prompts and can)


def _keeps_apart(config: Config, base: BaseFacts) -> bool:
    return base.model_type in PACKED_MODEL_TYPES and not _rope_depends_on_rows(config, base)


def choose_recomputation(plan: Plan, num_layers: int, vocab_size: int, room: Room) -> Choice:
    """What the layers keep, given what activations may take of this worker's memory."""
    if plan.recompute != "auto":
        return Choice((Keep.ALL if plan.recompute == "none" else Keep.HOST,) * num_layers)
    tokens = plan.tokens_per_micro_batch
    room = dataclasses.replace(room, may_hold_weights=plan.may_hold_weights)
    return choose(plan.layer_shape, num_layers, tokens, vocab_size, room)


def may_hold_weights(config: Config, known: Sizes) -> bool:
    """Whether fused layers may keep their weights dequantized between steps, where there is room.

    Where workers share the base, each holding all of it would undo that. DoRA changes their lengths at each step.
    """
    is_there = config.model.lora_variant != "dora" and known.offload == "none"
    return is_there and config.training.dequantized_weights == "auto" and not known.shares_base


def _recompute(config: Config, use_gpu: bool, known: Sizes) -> str:
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


def _gpu_of(hardware: Hardware) -> str:
    return next((name for name in hardware.accelerator_types if name in memory.PRODUCT_FLOPS), "")


def _memory_forecast(
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


def uses_gpu(config: Config, hardware: Hardware) -> bool:
    """Whether the workers train on GPUs. Raises ConfigError where they shall and there is none."""
    if config.ray.use_gpu is True and hardware.num_gpus == 0:
        raise ConfigError("ray.use_gpu=true: the cluster has no GPU. Use false or auto to train on CPUs.")
    return hardware.num_gpus > 0 if config.ray.use_gpu == "auto" else config.ray.use_gpu


def resources_of_a_worker(config: Config, use_gpu: bool) -> dict[str, float]:
    """Ray resources that one worker holds."""
    return {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {}), **config.ray.resources_per_worker}


def held(hardware: Hardware) -> dict[str, float]:
    """Ray resources of all nodes together."""
    return {**hardware.other_resources, "CPU": hardware.num_cpus, "GPU": hardware.num_gpus}


def check_workers_fit(config: Config, resources: dict[str, float], hardware: Hardware) -> None:
    """Refuse more workers than the cluster can ever hold. Raises ConfigError."""
    n = config.ray.min_workers
    of_all = held(hardware)
    for name, each in resources.items():
        holds = of_all.get(name, 0)
        if n * each > holds:
            fit = int(holds // each)
            way_out = f"Use ray.num_workers={fit}, or ask" if fit else "Ask"
            raise ConfigError(
                f"ray.num_workers={n}: {n} x {each:g} {name} = {n * each:g}, the cluster holds {holds:g}. "
                f"{way_out} for less with ray.resources_per_worker."
            )
    fit = sum(
        min(int(node.get(name, 0) // each) for name, each in resources.items() if each) for node in hardware.nodes
    )
    if hardware.nodes and fit < n:
        raise ConfigError(
            f"ray.num_workers={n}: a worker needs {resources} on one node, and the {len(hardware.nodes)} nodes hold "
            f"{fit} such workers. Use ray.num_workers={fit}, or ask for less with ray.resources_per_worker."
        )


def accumulation_of(config: Config) -> int:
    """Forward passes per optimizer step of each worker. Raises ConfigError where the global batch cannot be split."""
    training, n = config.training, config.num_row_groups
    if training.global_batch_size is None:
        return training.gradient_accumulation_steps
    each = training.batch_size * n
    if training.global_batch_size % each == 0:
        return training.global_batch_size // each
    works = [
        size for size in range(1, training.global_batch_size // n + 1) if training.global_batch_size % (size * n) == 0
    ]
    nearest = sorted(sorted(works, key=lambda size: abs(size - training.batch_size))[:2])
    way_out = f"Nearest that work: {', '.join(map(str, nearest))}." if nearest else f"Use a multiple of {n} rows."
    groups = "ray.num_workers" + (" / training.sequence_parallel" if training.sequence_parallel > 1 else "")
    raise ConfigError(
        f"training.batch_size={training.batch_size}: the global batch of {training.global_batch_size} is not a "
        f"multiple of batch_size x {groups} = {training.batch_size} x {n}. {way_out}"
    )


def _compute_dtype(config: Config, use_gpu: bool, hardware: Hardware) -> str:
    if config.quantization.compute_dtype != "auto":
        return config.quantization.compute_dtype
    if not use_gpu:
        return "float32"
    old = set(hardware.accelerator_types) & GPUS_WITHOUT_BFLOAT16
    return "float16" if old else "bfloat16"


def zero_stage(config: Config) -> int:
    """The ZeRO stage of the run. Raises ConfigError where a setting does not go with it."""
    ds = config.deepspeed
    stage = ds.zero_stage if ds.zero_stage != "auto" else (3 if config.ray.max_workers > 1 else 0)
    is_left_to_peft = config.model.lora_variant == "dora" and config.model.lora_dropout > 0
    if is_left_to_peft and stage == 3 and config.quantization.type != "none":
        raise ConfigError(
            f"model.lora_dropout={config.model.lora_dropout:g} with model.lora_variant=dora: is left to PEFT, which "
            "reads the base weight in backward, when ZeRO-3 has released it. Set model.lora_dropout: 0, or "
            "deepspeed.zero_stage: 2 (each worker then holds the whole 4-bit base)."
        )
    offload.refuse(config, stage)
    if ds.offload_optimizer != "none" and stage == 0:
        raise ConfigError(
            f"deepspeed.offload_optimizer={ds.offload_optimizer}: needs zero_stage 1, 2 or 3, the stage is 0."
        )
    return stage


def _notes(config: Config, base: BaseFacts, data: DataStats, steps_per_epoch: int, use_gpu: bool) -> tuple[str, ...]:
    notes, is_quantized, experts = [], config.quantization.type != "none", base.experts
    if experts and is_quantized and experts.num_packed < experts.num_parameters:
        share = (experts.num_parameters - experts.num_packed) / base.num_parameters
        notes.append(
            f"{share:.0%} of the base's weights are experts that stay 16-bit: those of {base.model_type} models do not "
            "compute as transformers' interface for experts has it, or lie in a folder whose other layers are 4-bit."
        )
    elif is_quantized and base.num_packed_parameters < 0.5 * base.num_parameters:
        share = 1 - base.num_packed_parameters / base.num_parameters
        notes.append(f"{share:.0%} of the base's weights are not linear layers (embeddings mostly): they stay 16-bit.")
    if base.is_packed:
        how = config.quantization
        notes.append(
            f"The base is stored in 4 bits, and trained on as it is: quantization.type={how.type}, "
            f"double_quant={str(how.double_quant).lower()}."
        )
    if base.context_length and config.training.max_length > base.context_length:
        notes.append(
            f"training.max_length={config.training.max_length} exceeds the base's context of {base.context_length}."
        )
    if config.training.packing and _rope_depends_on_rows(config, base):
        assert base.rope_limit is not None
        notes.append(
            f"Rows hold one sample each: beyond {base.rope_limit.num_tokens:,} tokens the base's RoPE "
            f"({base.rope_limit.kind}) depends on what else a row holds."
        )
    elif config.training.packing and not _keeps_apart(config, base):
        notes.append(
            f"Rows are padded, not packed: that {base.model_type} models keep the samples of a row apart is not shown."
        )
    is_asked = config.training.records == "pairs" and config.training.share_prompts
    if is_asked and not _keeps_apart(config, base):
        notes.append(
            "Each answer of a pair is read with a prompt of its own: the two cannot share a row, as is said above."
            if config.training.packing
            else f"Each answer of a pair is read with a prompt of its own: {base.model_type} models cannot share it."
        )
    left_out = left_out_of_all_linear(base.model_type)
    if left_out and config.model.target_modules == "all-linear":
        notes.append(
            f"all-linear leaves out {' and '.join(left_out)}, which PEFT does not adapt in {base.model_type} models."
        )
    if data.packed and steps_per_epoch < FEW_STEPS <= data.num_samples:
        each, steps = data.num_samples / data.num_rows, "1 step" if steps_per_epoch == 1 else f"{steps_per_epoch} steps"
        notes.append(
            f"Packed rows hold {each:.0f} samples each, so an epoch is only {steps}. "
            "For more and smaller ones lower training.max_length or batch_size, or set training.packing=false."
        )
    if use_gpu:
        notes += speed_notes(config, base)
    if use_gpu and not config.training.deterministic:
        notes.append(
            "GPU kernels may add in another order each time, so an interrupted run ends near the bits of one that was "
            "not, not at them. For the same bits, 1 to 6% slower: training.deterministic=true."
        )
    if data.num_truncated:
        limit = config.training.max_length
        notes.append(f"{data.num_truncated} of {data.num_records} records were cut to training.max_length={limit}.")
    notes += data.notes
    if data.num_rejected:
        notes.append(f"{data.num_rejected} of {data.num_records} records were rejected.")
    return tuple(notes)
