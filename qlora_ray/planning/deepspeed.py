"""The DeepSpeed config of a run: ours, and what a user's JSON may change in it."""

from typing import Any

from qlora_ray.config import Config, flat
from qlora_ray.errors import ConfigError
from qlora_ray.planning import offload

DECIDED_BY = {
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "train_batch_size": "training.global_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_clipping": "training.max_grad_norm",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "bf16.enabled": "quantization.compute_dtype",
    "fp16.enabled": "quantization.compute_dtype",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
}
CORRUPTING = {
    "zero_optimization.zero_quantized_weights": "quantizes the packed 4-bit bytes a second time.",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantizes the packed 4-bit bytes a second time.",
    "compile.deepcompile": "DeepCompile fails on frozen parameters.",
    "amp.enabled": "Apex amp casts weights behind ZeRO's back; use quantization.compute_dtype.",
    "torch_autocast.enabled": "casts a second time; use quantization.compute_dtype.",
}
NOT_THEIRS = {
    "optimizer": "the optimizer comes from the YAML (training.learning_rate, training.weight_decay).",
    "scheduler": "the schedule comes from the YAML (training.lr_schedule, training.warmup_ratio).",
    "checkpoint": "checkpoints come from the YAML (checkpoint.*).",
    "activation_checkpointing": "recomputation comes from the YAML (training.recompute).",
}


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


def defaults(config: Config, stage: int, accumulation: int, compute_dtype: str, num_trainable: int) -> dict[str, Any]:
    """The DeepSpeed config of a run, before a user's JSON."""
    ds = config.deepspeed
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # ZeRO-3 counts storage elements; 1e6 keeps norms resident instead of gathering each one. Between its forward
        # and its backward come the trained ones alone for the head, which stays, and more for a layer, which does not.
        zero |= {"stage3_param_persistence_threshold": 1_000_000, "stage3_max_live_parameters": 1e12,
                 "stage3_max_reuse_distance": num_trainable + 1_000_000,
                 "stage3_prefetch_bucket_size": 1_000_000_000}  # fmt: skip
    if stage > 1:
        # One bucket holds all gradients; the default takes a GiB whatever their number.
        zero["reduce_bucket_size"] = max(1_000_000, min(num_trainable, 500_000_000))
    if ds.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": config.training.batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.training.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": compute_dtype == "bfloat16"},
        "fp16": {"enabled": compute_dtype == "float16"},
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def merge(user: dict[str, Any], ours: dict[str, Any], num_row_groups: int) -> dict[str, Any]:
    """A user's JSON over ours: "auto" is filled in, explicit values win, contradictions are refused.

    Raises ConfigError with the key's dotted name.
    """
    refuse_contradictions(user, ours, num_row_groups)
    zero = user.get("zero_optimization")
    if isinstance(zero, dict):  # planning/offload.py has taken its own
        user = {**user, "zero_optimization": {name: one for name, one in zero.items() if name != "offload_param"}}
    return _merged(ours, user, _fixed(ours, num_row_groups))


def refuse_contradictions(
    user: dict[str, Any], ours: dict[str, Any], num_row_groups: int, open_sections: tuple[str, ...] = ()
) -> None:
    """Raise ConfigError for what a user's JSON must not say; sections that are still open contradict nothing."""
    fixed = {
        key: value for key, value in _fixed(ours, num_row_groups).items() if key.split(".")[0] not in open_sections
    }
    sections = {name.split(".")[0] for name in fixed if "." in name}
    for key, value in flat(user).items():
        if key == "zero_optimization.offload_optimizer.device" and value == "nvme":
            raise ConfigError(
                f"{key}=nvme in the DeepSpeed JSON: the state of an adapter's optimizer is small. Write cpu, and set "
                "deepspeed.offload_optimizer: cpu."
            )
        if key in CORRUPTING and value:
            raise ConfigError(f"{key}={value} in the DeepSpeed JSON: {CORRUPTING[key]} Remove it.")
        if key.split(".")[0] in NOT_THEIRS:
            raise ConfigError(f"{key} in the DeepSpeed JSON: {NOT_THEIRS[key.split('.')[0]]} Remove it.")
        if key in fixed and value not in ("auto", fixed[key]):
            raise ConfigError(
                f"{key}={value} in the DeepSpeed JSON contradicts {DECIDED_BY[key]}, which gives {fixed[key]}. "
                f'Write "auto" there, or change {DECIDED_BY[key]}.'
            )
        if key in sections and value != "auto":
            raise ConfigError(f'{key}={value} in the DeepSpeed JSON: must be an object, e.g. {{"enabled": "auto"}}.')


def _fixed(ours: dict[str, Any], num_row_groups: int) -> dict[str, Any]:
    """Dotted DeepSpeed keys that the YAML decides, with their values; each group of workers takes rows of its own."""
    zero = ours["zero_optimization"]
    micro_batch_size, accumulation = ours["train_micro_batch_size_per_gpu"], ours["gradient_accumulation_steps"]
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * num_row_groups,
        "zero_optimization.stage": zero["stage"],
        "bf16.enabled": ours["bf16"]["enabled"],
        "fp16.enabled": ours["fp16"]["enabled"],
        "gradient_clipping": ours["gradient_clipping"],
        "zero_optimization.offload_optimizer.device": zero.get("offload_optimizer", {}).get("device", "none"),
    }


def _merged(base: dict[str, Any], user: dict[str, Any], fixed: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    merged = dict(base)
    for key, value in user.items():
        if isinstance(value, dict):
            merged[key] = _merged(base.get(key, {}), value, fixed, f"{prefix}{key}.")
        elif value != "auto":
            merged[key] = value
        elif prefix + key in fixed:
            merged[key] = fixed[prefix + key]
    return merged
