"""Micro-batches padded to few shapes, as graphs are recorded of them."""

import pytest
import torch

from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.worker.graphs import PLACES, WIDTHS, _bare, padded


def rows(width: int, labelled: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows of `width` tokens of which those named are trained on."""
    ids = torch.arange(3, 3 + len(labelled) * width).view(len(labelled), width)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, columns in enumerate(labelled):
        labels[row, columns] = ids[row, columns]
    places = (labels[:, 1:] != IGNORE_INDEX).nonzero()
    return {"input_ids": ids, "labels": labels, "label_places": places[:, 0] * width + places[:, 1]}


def predictions(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(token, label) at each place whose next token is trained on, as the head finds them."""
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    at = [(int(batch["input_ids"].flatten()[place]), int(labels[place])) for place in batch["label_places"]]
    return [(token, label) for token, label in at if label != IGNORE_INDEX]


def test_padded_rows_predict_the_same_tokens():
    batch = rows(40, [[5, 6, 39], [1, 20]])
    more = padded(batch, widest=512)
    assert more["input_ids"].shape == more["labels"].shape == (2, WIDTHS)
    assert len(more["label_places"]) == 2 * WIDTHS  # and not PLACES, of which the rows have not as many
    assert predictions(more) == predictions(batch) and len(predictions(batch)) == 5


def test_rows_are_padded_no_further_than_the_longest():
    assert padded(rows(40, [[5]]), widest=48)["input_ids"].shape == (1, 48)
    assert padded(rows(WIDTHS, [[5]]), widest=512)["input_ids"].shape == (1, WIDTHS)


def test_batches_of_other_lengths_get_one_shape():
    several = [padded(rows(width, [[*range(1, width)]] * 8), 512) for width in (72, 96, 128)]
    shapes = {tuple(value.shape for value in batch.values()) for batch in several}
    assert len(shapes) <= 2 and all(len(batch["label_places"]) % PLACES == 0 for batch in several)


@pytest.mark.bites("worker.graphs.NO_HOOKS")
def test_modules_run_without_hooks_and_with_copies_only_while_a_graph_is_recorded():
    model, called = torch.nn.Linear(2, 2), []
    model.register_forward_hook(lambda *_: called.append("behind"))
    model.register_forward_pre_hook(lambda *_: called.append("before"))
    x = torch.ones(1, 2)
    with torch.no_grad():
        own = model(x)
        called.clear()
        with _bare(model, [(model.weight, torch.zeros(2, 2))]):
            assert torch.equal(model(x)[0], model.bias) and not called
        assert torch.equal(model(x), own) and called == ["before", "behind"]
