"""The loss: nats over unmasked tokens, summed, so that no mean of means can creep in; of pairs log-probabilities."""

# B rows in a micro-batch, T tokens per row, V vocabulary, L places whose next token is trained on
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.model.attention import mask_of_borders, masks_of_model, no_mask
from qlora_ray.model.head import expecting, returns_nats


def sum_of_nats(model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of a micro-batch summed over its unmasked tokens: a float32 scalar, in nats.

    Rows are padded on the right: under causal attention no real token sees padding, so the model needs no mask, and
    attention takes its fastest kernels. Samples of a packed row are kept apart by their borders where the model can do
    that, else by the mask that transformers makes of position_ids. Where the batch says which places predict a token
    that is trained on, a fused model leaves out what only other places need.
    """
    made, is_nats = _forward(model, batch)
    if is_nats:
        return made.sum()
    labels = targets(batch)
    logits = made[:, : labels.shape[1]].float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def log_probabilities(model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each answer in a micro-batch of pairs, and its tokens: float32 (2 P,), chosen ones first."""
    made, is_nats = _forward(model, batch)
    places, counts, order = batch["label_places"], batch["label_counts"], batch["answer_order"]
    if is_nats:
        nats = made if len(made) == len(places) else made[places]  # (L,)
    else:
        labels = batch["labels"].flatten()[places + 1]  # a place is never its row's last
        nats = F.cross_entropy(made.flatten(0, 1)[places].float(), labels, reduction="none")
    if not len(counts):  # rows that only fill the batch up
        return nats.sum() * counts.float(), counts.float()
    # unsafe: else the host asks the GPU whether the lengths add up, and waits; worker/batches.py made them so.
    return torch.segment_reduce(-nats, "sum", lengths=counts, unsafe=True)[order], counts.float()[order]


def num_label_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unmasked tokens that sum_of_nats adds up: an int64 scalar."""
    return (targets(batch) != IGNORE_INDEX).sum()


def targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the tokens of each row predict: (B, T - 1) int64, of parts of rows (B, S).

    IGNORE_INDEX on the prompt and on a sample's first token.
    """
    return batch["targets"] if "targets" in batch else batch["labels"][:, 1:]


def _forward(model: Callable[..., Any], batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """Logits (B, T, V) and False; or, of a head with the loss in it, nats and True: (B T,), or of label_places (L,)."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    module: Any = getattr(model, "module", model)
    borders, ids = batch.get("sample_borders"), batch["input_ids"]
    takes_borders, numbers = getattr(module, "takes_borders", False), batch.get("place_numbers")
    if borders is not None and takes_borders:
        inputs["attention_mask"] = mask_of_borders(borders, ids.device, batch.get("num_shared"))
    elif "num_shared" in batch:
        assert borders is not None
        mask = mask_of_borders(borders, ids.device, batch["num_shared"])
        inputs["attention_mask"] = masks_of_model(module.config.get_text_config(), mask, ids.shape)
    elif ("position_ids" not in batch or numbers is not None) and takes_borders:
        inputs["attention_mask"] = no_mask(ids.device)
    head, labels = module.get_output_embeddings(), targets(batch)
    is_nats = returns_nats(head)
    labels = F.pad(labels, (0, ids.shape[1] - labels.shape[1]), value=IGNORE_INDEX)  # (B, T): the last has no successor
    with (
        nullcontext() if numbers is None else module.row_holders.are(module.row_group, batch["token_numbers"]),
        expecting(head, labels, batch.get("label_places"), numbers) if is_nats else nullcontext(),
    ):
        return model(**inputs, use_cache=False).logits, is_nats
