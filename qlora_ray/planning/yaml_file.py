"""Suggested settings as a short YAML file that says of each why, and as a few lines for the terminal."""

import json
from typing import Any

import yaml

from qlora_ray.model.facts import ModelFacts
from qlora_ray.planning.suggest import Machine, Suggestion

FOR_ALL = "Every other key has a default: docs/config.md."


def as_yaml(made: Suggestion, base: ModelFacts, machine: Machine) -> str:
    """The file: sections, keys, and a comment where a reader would ask why."""
    why = comments(made, base, machine)
    lines = [f"# Written by python -m qlora_ray.init for {machine}. {FOR_ALL}"]
    for section, values in made.values.items():
        lines.append(f"{section}:")
        for key, value in values.items():
            setting, comment = f"  {key}: {_scalar(value)}", why.get(f"{section}.{key}")
            lines.append(f"{setting:<34}  # {comment}" if comment else setting)
    return "\n".join(lines) + "\n"


def comments(made: Suggestion, base: ModelFacts, machine: Machine) -> dict[str, str]:
    """By dotted key: why it has this value."""
    plan, lengths = made.plan, made.lengths
    steps = f"{plan.num_steps:,} steps, about {plan.steps_per_epoch:,} an epoch"
    kept = {"none": "everything is kept for backward: it fits", "all": "layers are computed again in backward",
            "auto": "layers keep for backward what fits"}  # fmt: skip
    return {
        "model.base_model": f"{base.model_type}, {_millions(base.num_parameters)} parameters, "
        f"{plan.four_bit_share:.0%} of them in 4 bits",
        "model.target_modules": f"{_targets(base)}: {_millions(plan.num_trainable_parameters)} parameters are trained",
        "training.num_epochs": steps,
        "training.batch_size": f"rows a forward pass; about {_memory(made.peak_gib)} of {machine.gib:.4g} GiB",
        "training.gradient_accumulation_steps": f"{_of(plan.global_batch_size, 'row')} an optimizer step",
        "training.max_length": f"samples: median {lengths.percentile(50):,} tokens, 95 of 100 within "
        f"{lengths.percentile(95):,}, longest {lengths.percentile(100):,}",
        "training.recompute": kept[plan.recompute],
        "data.train_file": f"{lengths.num_records:,} records: {', '.join(lengths.formats)}",
        "data.chat_template": "the base has none of its own, or none that shows all of these records",
        "data.max_bad_fraction": "so many may be left out: unusable, or a prompt that alone fills a row",
        "data.validation_split": _held_out(made),
        "evaluation.num_prompts": "answered by base and adapter at the end, and compared"
        if made.config.evaluation.num_prompts
        else "nothing to ask: no held-out question, or none that fits into the base's context with an answer",
    }  # fmt: skip


def told(made: Suggestion, base: ModelFacts, machine: Machine) -> dict[str, str]:
    """What was chosen and why, in five lines by name."""
    plan, training, lengths = made.plan, made.config.training, made.lengths
    why = comments(made, base, machine)
    cut = f"; {made.num_cut} of 100 samples are cut" if made.num_cut else ""
    template = made.config.data.chat_template or "the base's own chat template"
    return {
        "base": f"{why['model.base_model']}; LoRA r={made.config.model.lora_r} on {why['model.target_modules']}",
        "data": f"{why['data.train_file']}; {'texts as they are' if lengths.is_raw_text else f'template: {template}'}",
        "length": f"{training.max_length:,} tokens a row ({why['training.max_length']}{cut})",
        "memory": f"{_memory(made.peak_gib)} on {machine}: {_of(training.batch_size, 'row')} a pass x "
        f"{plan.gradient_accumulation_steps} accumulated x {_of(plan.num_workers, 'worker')}; "
        f"{why['training.recompute']}",
        "run": f"{_of(int(training.num_epochs), 'epoch')}, {why['training.num_epochs']}; "
        f"{why['data.validation_split']}",
    }


def _held_out(made: Suggestion) -> str:
    share, every = made.config.data.validation_split, made.plan.eval_every_steps
    if not share:
        return "too few records to hold some out"
    held = round(share * made.lengths.num_records)
    return f"{_of(held, 'record')} held out, looked at every {_of(every or 1, 'step')}"


def _targets(base: ModelFacts) -> str:
    names = list(base.adapted_layers)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _memory(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def _of(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value, ensure_ascii=False)
    return yaml.safe_dump(value).splitlines()[0]


def _is_plain(text: str) -> bool:
    """Whether YAML reads the text as it stands as itself, a comment behind it too."""
    try:
        return yaml.safe_load(f"key: {text}  # x") == {"key": text}
    except yaml.YAMLError:
        return False
