"""Judges a model that is being trained, in place and sharded: validation loss, and answers to held-out prompts."""

import json
import math
from contextlib import nullcontext

import numpy as np
import torch

from qlora_ray.config import Config
from qlora_ray.data.rows import open_rows
from qlora_ray.model.answer import answer_texts, exact_match
from qlora_ray.storage import Folder
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.engine import Engine
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats
from qlora_ray.worker.team import Team

PROMPTS_PER_BATCH = 32


def validation_loss(
    engine: Engine, rows: Folder, batch_size: int, pad_token_id: int, device: torch.device, team: Team
) -> dict[str, float]:
    """eval_loss (nats per unmasked token) and eval_perplexity over all validation rows. Every worker must call this."""
    held_out = open_rows(rows, "validation")
    batches = [
        np.arange(first, min(first + batch_size, len(held_out))) for first in range(0, len(held_out), batch_size)
    ]
    rounds = -(-len(batches) // team.size)
    nats, tokens = [], 0.0
    engine.train(False)
    with torch.no_grad():
        for i in range(rounds):
            mine = i * team.size + team.rank
            # A worker without a batch left computes one all the same: ZeRO-3's forward is a collective.
            batch = to_tensors(held_out.gather(batches[min(mine, len(batches) - 1)]), pad_token_id, device)
            value = sum_of_nats(engine.module, batch)
            if mine < len(batches):
                nats.append(float(value))
                tokens += int(num_label_tokens(batch))
    engine.train()
    (tokens,) = team.sum(tokens)
    # fsum rounds once, at the end: the sum does not depend on which worker had which batch.
    loss = math.fsum(value for of_worker in team.gather(nats) for value in of_worker) / tokens
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


def compare_answers(config: Config, engine: Engine, rows: Folder, tokenizer, device: torch.device, team: Team) -> dict:
    """Greedy answers of base and adapter to held-out prompts: exact match of each, and the answers.

    Every worker must call this; each answers its share, in lockstep.
    """
    prompts = json.loads((rows / "prompts.json").read_bytes())[: config.evaluation.num_prompts]
    if not prompts:
        return {}
    engine.train(False)
    answers = {
        who: _answers(config, engine, prompts, tokenizer, device, team, adapter_on=who == "adapter")
        for who in ("base", "adapter")
    }
    engine.train()
    samples = [
        {"prompt": prompt["prompt"], "expected": prompt["expected"], "base": base, "adapter": adapter}
        for prompt, base, adapter in zip(prompts, answers["base"], answers["adapter"], strict=True)
    ]
    expected = [prompt["expected"] for prompt in prompts]
    right = {f"exact_match_{who}": exact_match(texts, expected) for who, texts in answers.items()}
    return {**right, "samples": samples}


def sample_answers(config: Config, engine: Engine, rows: Folder, tokenizer, device: torch.device, team: Team) -> list:
    """Greedy answers to the same few held-out prompts at each validation. Every worker must call this."""
    count = min(config.evaluation.num_samples, config.evaluation.num_prompts)
    prompts = json.loads((rows / "prompts.json").read_bytes())[:count]
    if not prompts:
        return []
    engine.train(False)
    answers = _answers(config, engine, prompts, tokenizer, device, team, adapter_on=True)
    engine.train()
    return [
        {"prompt": prompt["prompt"], "expected": prompt["expected"], "adapter": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _answers(config, engine, prompts, tokenizer, device, team: Team, adapter_on: bool) -> list[str]:
    model = engine.module
    share = -(-len(prompts) // team.size)
    mine = prompts[team.rank * share : (team.rank + 1) * share]
    filler = prompts[:1] * (share - len(mine))
    texts = []
    with nullcontext() if adapter_on else model.disable_adapter():
        for start in range(0, share, PROMPTS_PER_BATCH):
            some = (mine + filler)[start : start + PROMPTS_PER_BATCH]
            texts += answer_texts(
                model,
                [prompt["input_ids"] for prompt in some],
                tokenizer,
                device,
                max_new_tokens=config.evaluation.max_new_tokens,
                synced_gpus=team.size > 1,
            )
    return [text for part in team.gather(texts[: len(mine)]) for text in part]
