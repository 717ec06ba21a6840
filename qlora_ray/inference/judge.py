"""Measures a base and its adapter on examples: the same masks as training, the same answers as its exact match."""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from qlora_ray.config import Config
from qlora_ray.data import examples as examples_of_file
from qlora_ray.data.rows import open_rows
from qlora_ray.data.tokenize import Encoder
from qlora_ray.errors import ConfigError
from qlora_ray.inference.load import Loaded
from qlora_ray.model.answer import PROMPTS_PER_BATCH, answer_texts, exact_match, token_f1
from qlora_ray.model.record import Adapter
from qlora_ray.storage import open_folder
from qlora_ray.worker.batches import slices, to_tensors
from qlora_ray.worker.loss import log_probabilities, num_label_tokens, sum_of_nats


@dataclass(frozen=True)
class Examples:
    """Rows with labels, and the prompts in them with the answers that are expected."""

    rows: pa.Table  # input_ids, labels and, where the run packed its rows, position_ids
    prompts: list[dict[str, Any]]  # prompt, expected, input_ids
    rejected: pa.Table | None = None  # where rows hold the chosen samples of pairs: the other ones, in the same order


def read_examples(adapter: Adapter, tokenizer: Any, file: str | None) -> Examples:
    """The records of a file, or without one the held-out rows of the adapter's run. Raises ConfigError."""
    return _held_out(adapter) if file is None else _from_file(adapter, tokenizer, file)


def num_prompts_of_run(adapter: Adapter) -> int:
    """How many held-out prompts the run itself answered."""
    return _run_config(adapter).evaluation.num_prompts


def run_options(adapter: Adapter) -> dict[str, Any]:
    """The generation options of the run's own exact match."""
    return {"max_new_tokens": _run_config(adapter).evaluation.max_new_tokens}


def judge(
    loaded: Loaded, examples: Examples, num_prompts: int, batch_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Figures of the base and of the base with its adapter, and the answers of both."""
    prompts = examples.prompts[:num_prompts]
    results: dict[str, Any] = {}
    answers, of_pairs = {}, {}
    for who in ("base", "with_adapter"):
        with nullcontext() if who == "with_adapter" else loaded.model.disable_adapter():
            results[who], tokens = loss_of(loaded, examples.rows, batch_size)
            if examples.rejected is not None:
                both = (examples.rows, examples.rejected)
                of_pairs[who] = [log_probabilities_of(loaded, rows, batch_size) for rows in both]
                results[who]["pairs_right"] = float((of_pairs[who][0] > of_pairs[who][1]).mean())
            if prompts:
                answers[who] = _answers(loaded, prompts, options)
                expected = [prompt["expected"] for prompt in prompts]
                results[who] |= {
                    "exact_match": exact_match(answers[who], expected), "token_f1": token_f1(answers[who], expected)
                }  # fmt: skip
    return {
        **results,
        **({"rewards": _rewards(of_pairs)} if of_pairs else {}),
        "num_rows": examples.rows.num_rows,
        "num_label_tokens": tokens,
        "num_prompts": len(prompts),
        "answers": [
            {"prompt": p["prompt"], "expected": p["expected"], **{who: texts[i] for who, texts in answers.items()}}
            for i, p in enumerate(prompts)
        ],
    }


def log_probabilities_of(loaded: Loaded, rows: pa.Table, batch_size: int) -> np.ndarray:
    """Log-probability of each row's answer, a sum over its tokens, (N,)."""
    found: list[float] = []
    with torch.no_grad():
        for some in slices(rows, batch_size):
            for name, value in (("places", 0), ("is_rejected", False), ("is_desirable", True)):
                some = some.append_column(name, pa.array([[value]] * some.num_rows))
            batch = to_tensors(some, loaded.tokenizer.pad_token_id, loaded.device)
            found += log_probabilities(loaded.model, batch)[0].tolist()
    return np.array(found)


def _rewards(of_pairs: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Of the adapter against its base, without beta: the mean margin of log-ratios, and how often it is above 0."""
    chosen, rejected = (
        after - before for before, after in zip(of_pairs["base"], of_pairs["with_adapter"], strict=True)
    )
    return {"accuracies": float((chosen > rejected).mean()), "margins": float((chosen - rejected).mean())}


def loss_of(loaded: Loaded, rows: pa.Table, batch_size: int) -> tuple[dict[str, float], int]:
    """loss (nats per unmasked token) and perplexity over all rows; and the number of unmasked tokens."""
    nats = tokens = 0.0
    with torch.no_grad():
        for some in slices(rows, batch_size):
            batch = to_tensors(some, loaded.tokenizer.pad_token_id, loaded.device)
            nats += float(sum_of_nats(loaded.model, batch))
            tokens += int(num_label_tokens(batch))
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, int(tokens)


def lm_eval(loaded: Loaded, tasks: list[str], limit: int | None, include_path: str | None) -> dict[str, Any]:
    """Results of lm-evaluation-harness tasks, for base and adapter, through the model's chat template."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"--tasks {','.join(unknown)}: lm-eval knows no such task.")
    results: dict[str, Any] = {}
    for who in ("base", "with_adapter"):
        with nullcontext() if who == "with_adapter" else loaded.model.disable_adapter():
            model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, device=str(loaded.device))
            found = lm_eval.simple_evaluate(
                model, tasks=tasks, limit=limit, task_manager=manager, apply_chat_template=True, bootstrap_iters=0
            )
        for task, metrics in found["results"].items():
            for name, value in metrics.items():
                if isinstance(value, float) and "stderr" not in name:
                    results.setdefault(task, {}).setdefault(name.removesuffix(",none"), {})[who] = value
    return results


def _answers(loaded: Loaded, prompts: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    texts = []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        ids = [prompt["input_ids"] for prompt in prompts[start : start + PROMPTS_PER_BATCH]]
        texts += answer_texts(loaded.model, ids, loaded.tokenizer, loaded.device, **options)
    return texts


def _held_out(adapter: Adapter) -> Examples:
    wanted = adapter.record["data"]["fingerprint"]
    if adapter.run is None:
        raise ConfigError(
            f"--adapter {adapter.folder}: does not lie in its run directory, so its held-out rows are not known. "
            "Name a file of records with --file."
        )
    entry = open_folder(str(adapter.run.parent.resolve())) / "cache" / wanted
    if not (entry / "stats.json").exists():
        raise ConfigError(f"{entry.path}: the run's tokenized rows are gone. Name a file of records with --file.")
    rows = open_rows(entry, "validation")
    if not len(rows):
        raise ConfigError(f"--adapter {adapter.folder}: its run held nothing out. Name a file of records with --file.")
    numbers = np.arange(len(rows))
    prompts = json.loads((entry / "prompts.json").read_bytes())
    if not rows.pairs:
        return Examples(rows.gather(numbers), prompts)
    chosen, rejected = rows.halves(numbers)
    return Examples(chosen, prompts, None if rows.labelled else rejected)


def _from_file(adapter: Adapter, tokenizer: Any, file: str) -> Examples:
    config = _run_config(adapter)
    encoder = Encoder(tokenizer, config.training.max_length, config.data.train_on, config.data.keep_thoughts)
    asked = (file, "--file", encoder, config.data.format, config.data.max_bad_fraction)
    pairs = examples_of_file.read_pairs(*asked)
    if pairs:
        chosen, rejected, prompts = pairs
        return Examples(chosen, prompts, rejected)
    return Examples(*examples_of_file.read_examples(*asked))


def _run_config(adapter: Adapter) -> Config:
    """The settings that the adapter was trained with, as its record has them."""
    return Config.model_validate(yaml.safe_load(json.dumps(adapter.record["config"])))
