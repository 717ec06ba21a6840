"""Judges a model that is being trained, in place and sharded: validation loss, and answers to held-out prompts."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qlora_ray.data.rows import Rows, open_rows
from qlora_ray.model.answer import PROMPTS_PER_BATCH, answer_texts, exact_match
from qlora_ray.worker.batches import apart, to_tensors
from qlora_ray.worker.loss import log_probabilities, num_label_tokens, sum_of_nats
from qlora_ray.worker.messages import Warned
from qlora_ray.worker.metrics import means
from qlora_ray.worker.rounds import rounds
from qlora_ray.worker.worker import Worker


def validation_loss(worker: Worker) -> dict[str, float]:
    """eval_loss (nats per unmasked token) and eval_perplexity over all validation rows. Every worker must call this.

    Of pairs: eval_loss is the mean over them, and each of objectives.FIGURES has a value too, as eval_rewards/chosen.
    """
    engine, team, seat, preference = worker.engine, worker.team, worker.seat, worker.preferences.get("validation")
    held_out = open_rows(worker.run.rows, "validation")
    if preference and held_out.labelled:
        preference = replace(preference, kl=preference.measured_kl(engine, team, _mismatched(worker, held_out)))
    mine: list[list[float]] = []
    number = 0.0
    engine.train(False)
    with torch.no_grad():
        for rows, counts in rounds(held_out, worker.run.config.training.batch_size, seat):
            rows = apart(rows)[0] if held_out.labelled else rows
            batch = to_tensors(rows, worker.tokenizer.pad_token_id, worker.device, seat)
            if preference:
                loss, figures = preference.sums(engine.module, batch)
                size = len(batch["places"]) // (1 if held_out.labelled else 2)
                of_batch = [float(loss), *figures.tolist()]
            else:
                of_batch, size = [float(sum_of_nats(engine.module, batch))], int(num_label_tokens(batch))
            if counts:
                mine.append(of_batch)
                number += size
    engine.train()
    (number,) = team.sum(number)
    # fsum rounds once, at the end: a sum does not depend on which worker had which batch.
    parts = [sums for of_worker in team.gather(mine) for sums in of_worker]
    made = means(parts, int(number), held_out.labelled)
    found = {f"eval_{name}": value for name, value in made.items()}
    return found if preference else {**found, "eval_perplexity": math.exp(min(found["eval_loss"], 700.0))}


def _mismatched(worker: Worker, held_out: Rows) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
    """Batches of held-out prompts with other answers, and whether each counts."""
    for rows, counts in rounds(held_out, worker.run.config.training.batch_size, worker.seat):
        yield to_tensors(apart(rows)[1], worker.tokenizer.pad_token_id, worker.device), counts


def compare_answers(worker: Worker) -> dict[str, Any]:
    """Greedy answers of base and adapter to held-out prompts: exact match of each, and the answers.

    Every worker must call this; each answers its share, in lockstep.
    """
    prompts, note = _prompts(worker, worker.run.config.evaluation.num_prompts)
    if note:
        worker.team.tell(Warned(note))
    if not prompts:
        return {}
    answers = {who: _answers(worker, prompts, adapter_on=who == "adapter") for who in ("base", "adapter")}
    samples = [
        {"prompt": prompt["prompt"], "expected": prompt["expected"], "base": base, "adapter": adapter}
        for prompt, base, adapter in zip(prompts, answers["base"], answers["adapter"], strict=True)
    ]
    expected = [prompt["expected"] for prompt in prompts]
    right = {f"exact_match_{who}": exact_match(texts, expected) for who, texts in answers.items()}
    return {**right, "samples": samples}


def compare_pairs(worker: Worker) -> list[dict[str, Any]]:
    """A few held-out pairs, and how many nats likelier the chosen answer is than the other: to the base, and now.

    Every worker must call this; each computes the same.
    """
    held_out, config = open_rows(worker.run.rows, "validation"), worker.run.config
    if not held_out.pairs or held_out.labelled or not len(held_out):
        return []
    rows = np.arange(min(len(held_out), config.training.batch_size))
    batch = to_tensors(held_out.gather(rows), worker.tokenizer.pad_token_id, worker.device)
    halves = [half.to_pylist() for half in held_out.halves(rows)]
    margins, model = [], worker.engine.module
    worker.engine.train(False)
    for adapter in (model.disable_adapter(), nullcontext()):
        with torch.no_grad(), adapter:
            chosen, rejected = log_probabilities(model, batch)[0].chunk(2)
        margins.append((chosen - rejected).tolist())
    worker.engine.train()
    made = [
        {**_texts(worker.tokenizer, chosen, rejected), "base": base, "adapter": now}
        for chosen, rejected, base, now in zip(*halves, *margins, strict=True)
    ]
    return made[: config.evaluation.num_samples]


def _texts(tokenizer: Any, chosen: dict[str, list[int]], rejected: dict[str, list[int]]) -> dict[str, str]:
    """Prompt, chosen and rejected answer of a pair, as they are read."""
    starts = [next(i for i, label in enumerate(half["labels"]) if label >= 0) for half in (chosen, rejected)]
    parts = {
        "prompt": chosen["input_ids"][: starts[0]],
        "chosen": chosen["input_ids"][starts[0] :],
        "rejected": rejected["input_ids"][starts[1] :],
    }
    return {name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in parts.items()}


def sample_answers(worker: Worker) -> list[dict[str, Any]]:
    """Greedy answers to the same few held-out prompts at each validation. Every worker must call this."""
    evaluation = worker.run.config.evaluation
    prompts, _ = _prompts(worker, min(evaluation.num_samples, evaluation.num_prompts))
    if not prompts:
        return []
    answers = _answers(worker, prompts, adapter_on=True)
    return [
        {"prompt": prompt["prompt"], "expected": prompt["expected"], "adapter": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _prompts(worker: Worker, count: int) -> tuple[list[dict[str, Any]], str]:
    """The first held-out prompts that the base has positions for, and what to say of the others and of the answers."""
    prompts = json.loads((worker.run.rows / "prompts.json").read_bytes())[:count]
    context, asked = context_length(worker.engine.module.config), worker.run.config.evaluation.max_new_tokens
    fitting = [prompt for prompt in prompts if len(prompt["input_ids"]) < context]
    if len(fitting) == len(prompts) and max(map(_length, prompts), default=0) + asked <= context:
        return prompts, ""
    return fitting, (
        f"Held-out prompts: {len(prompts) - len(fitting)} of {len(prompts)} fill the base's context of {context:,} "
        f"tokens and are left out; answers end where it ends, before evaluation.max_new_tokens={asked}."
    )


def _length(prompt: dict[str, Any]) -> int:
    return len(prompt["input_ids"])


def context_length(config: Any) -> int:
    """Positions of a model; where its config does not say, more than there can be."""
    text = config.get_text_config()
    learned, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    # The other types of RoPE for long rows say in max_position_embeddings how far they reach.
    return int(learned * rope["factor"]) if learned and rope.get("rope_type") == "linear" else learned or sys.maxsize


def _answers(worker: Worker, prompts: list[dict[str, Any]], adapter_on: bool) -> list[str]:
    engine, team, model = worker.engine, worker.team, worker.engine.module
    left = context_length(model.config) - max(map(_length, prompts))  # the same on every worker: they go in lockstep
    share = -(-len(prompts) // team.size)
    mine = prompts[team.rank * share : (team.rank + 1) * share]
    filler = prompts[:1] * (share - len(mine))
    texts = []
    engine.train(False)
    with nullcontext() if adapter_on else model.disable_adapter():
        for start in range(0, share, PROMPTS_PER_BATCH):
            some = (mine + filler)[start : start + PROMPTS_PER_BATCH]
            texts += answer_texts(
                model,
                [prompt["input_ids"] for prompt in some],
                worker.tokenizer,
                worker.device,
                max_new_tokens=min(left, worker.run.config.evaluation.max_new_tokens),
                synced_gpus=team.size > 1,
            )
    engine.train()
    return [text for part in team.gather(texts[: len(mine)]) for text in part]
