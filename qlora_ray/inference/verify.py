"""Runs an adapter and the model merged from it side by side, and says how far they are apart."""

# B rows in a batch, T tokens per row, V vocabulary
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.inference.judge import Examples
from qlora_ray.inference.load import Loaded
from qlora_ray.model.answer import generation_options, left_padded
from qlora_ray.model.architecture import load_filled
from qlora_ray.model.whole import refuse_unfilled
from qlora_ray.worker.batches import slices, to_tensors

ROWS_PER_BATCH = 8


@dataclass(frozen=True)
class Drift:
    """How a merged model differs from the adapter on its base, over some rows."""

    num_rows: int
    num_tokens: int
    mean_kl: float  # nats per token, KL(adapter || merged)
    max_kl: float
    max_logit_drift: float
    max_logit: float  # largest absolute logit of the adapter, to judge the drift by
    adapter_loss: float  # nats per answer token
    merged_loss: float
    num_greedy_tokens: int
    changed_greedy_tokens: float  # share, in answers written freely by each

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def load_merged(
    folder: Path, dtype: str, device: torch.device, trust_remote_code: bool = False, factory: str | None = None
) -> Any:
    """The merged model as anyone loads it: plain transformers. Raises ConfigError where its files do not fill it."""
    how = {"dtype": getattr(torch, dtype), "device_map": {"": device}}
    model, found = load_filled(str(folder), trust_remote_code, factory, **how)
    refuse_unfilled(f"merged model {folder}", model, found)
    return model.eval()


def measure(loaded: Loaded, merged: Any, examples: Examples, num_rows: int, max_new_tokens: int) -> Drift:
    """Compare logits on the rows, and greedy answers to their prompts."""
    rows = examples.rows.slice(0, num_rows)
    kls, drift, top, losses, labelled = [], 0.0, 0.0, torch.zeros(2), 0
    with torch.no_grad():
        for some in slices(rows, ROWS_PER_BATCH):
            batch = to_tensors(some, loaded.tokenizer.pad_token_id, loaded.device)
            ours, theirs = (_logits(model, batch) for model in (loaded.model, merged))  # each (B, T, V) float32
            lengths = torch.tensor([len(ids) for ids in some["input_ids"]], device=loaded.device)
            is_real = torch.arange(batch["input_ids"].shape[1], device=loaded.device) < lengths[:, None]  # (B, T)
            ours, theirs, labels = ours[:, :-1], theirs[:, :-1], batch["labels"][:, 1:]
            is_real = is_real[:, 1:]
            p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1)[is_real])
            drift = max(drift, float((ours - theirs)[is_real].abs().max()))
            top = max(top, float(ours[is_real].abs().max()))
            is_label = labels != IGNORE_INDEX
            labelled += int(is_label.sum())
            for i, log_probabilities in enumerate((p, q)):
                losses[i] -= log_probabilities[is_label].gather(-1, labels[is_label][:, None]).sum().cpu()
    kl = torch.cat(kls)
    num_tokens, changed = _greedy(loaded, merged, examples.prompts[:num_rows], max_new_tokens)
    return Drift(
        num_rows=rows.num_rows,
        num_tokens=len(kl),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        max_logit_drift=drift,
        max_logit=top,
        adapter_loss=float(losses[0] / labelled),
        merged_loss=float(losses[1] / labelled),
        num_greedy_tokens=num_tokens,
        changed_greedy_tokens=changed / max(1, num_tokens),
    )


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits.float()


def _greedy(loaded: Loaded, merged: Any, prompts: list[dict[str, Any]], max_new_tokens: int) -> tuple[int, int]:
    """Tokens in the adapter's greedy answers, and how many the merged model's answers have otherwise there."""
    total = changed = 0
    options = generation_options(loaded.model, loaded.tokenizer, {"max_new_tokens": max_new_tokens})
    pad = loaded.tokenizer.pad_token_id
    for start in range(0, len(prompts), ROWS_PER_BATCH):
        ids = [prompt["input_ids"] for prompt in prompts[start : start + ROWS_PER_BATCH]]
        inputs = left_padded(ids, pad, loaded.device)
        width = inputs["input_ids"].shape[1]
        with torch.no_grad():
            ours, theirs = (model.generate(**inputs, **options)[:, width:].tolist() for model in (loaded.model, merged))
        for our, their in zip(ours, theirs, strict=True):
            said = _until_stop(our, options["eos_token_id"])
            total += len(said)
            changed += sum(token != other for token, other in zip(said, their + [None] * len(said), strict=False))
    return total, changed


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens
