"""Samples that share a row do not see each other: logits, loss and gradients are those of each sample alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_ray.data.tokenize import Sample
from qlora_ray.planning.rows import PACKED_MODEL_TYPES
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats
from tests.integration import tiny_models
from tests.made_rows import make_rows

CPU = torch.device("cpu")
LENGTHS = (19, 2, 11, 14, 1, 7)
ROWS = [[0, 1, 2], [3, 4, 5]]  # of 32 and 22 tokens: the second ends in padding
WINDOW = {"sliding_window": 6}  # shorter than the samples
MODELS = {name: (name, {}) for name in tiny_models.FAMILIES} | {
    "mistral, sliding window": ("mistral", WINDOW),
    "phi3, sliding window": ("phi3", WINDOW),
    "gemma2, sliding window": ("gemma2", WINDOW),
    "gemma3_text, sliding window": ("gemma3_text", WINDOW),
    "qwen2, sliding window": ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3, sliding window": ("qwen3", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
}


def build(name: str, attention: str) -> torch.nn.Module:
    family, more = MODELS[name]
    own = tiny_models.FAMILIES[family]
    sizes = own if family == "gpt2" else {**tiny_models.SIZES, **own, **more}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def samples():
    random = torch.Generator().manual_seed(1)
    return [
        Sample(torch.randint(3, 2048, (n,), generator=random).tolist(), [(max(1, n // 3), n)] if n > 1 else [], False)
        for n in LENGTHS
    ]


@pytest.fixture(scope="module")
def packed(samples, tmp_path_factory):
    """The micro-batch of both rows, as the loop gets it."""
    import numpy as np

    rows = make_rows(tmp_path_factory.mktemp("cache"), samples, ROWS)
    return to_tensors(rows.gather(np.array([0, 1])), pad_token_id=0, device=CPU)


def alone(sample: Sample) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([sample.input_ids]), "labels": torch.tensor([sample.labels])}


def logits_differ_by(model, samples, packed) -> float:
    """Largest difference between a sample's logits in its row and alone."""
    with torch.no_grad():
        together = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
        worst = 0.0
        for row, numbers in enumerate(ROWS):
            start = 0
            for number in numbers:
                one = model(input_ids=alone(samples[number])["input_ids"], use_cache=False).logits[0]
                worst = max(worst, float((together[row, start : start + len(one)] - one).abs().max()))
                start += len(one)
    return worst


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_packed_row_are_those_of_its_samples_exactly_where_the_plan_packs(name, attention, samples, packed):
    family = MODELS[name][0]
    if (family, attention) in {("gemma2", "sdpa")}:
        pytest.skip("transformers has no such attention for it")
    difference = logits_differ_by(build(name, attention), samples, packed)
    # Logits of about 1: float32 rounds them by 1e-6, and seeing another sample is worth 1e-3 and more.
    assert (difference < 1e-5) == (family in PACKED_MODEL_TYPES), difference


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] in PACKED_MODEL_TYPES])
def test_loss_and_gradients_of_packed_rows_are_the_sums_of_their_samples(name, samples, packed):
    model = build(name, "eager" if MODELS[name][0] == "gemma2" else "sdpa")

    def gradients():
        found = {
            parameter: value.grad.clone() for parameter, value in model.named_parameters() if value.grad is not None
        }
        model.zero_grad()
        return found

    together = sum_of_nats(model, packed)
    together.backward()
    packed_gradients = gradients()
    nats = [sum_of_nats(model, alone(sample)) for sample in samples if sample.spans]
    sum(nats).backward()
    own_gradients = gradients()

    assert num_label_tokens(packed) == sum(sample.num_labels for sample in samples)
    assert packed_gradients.keys() == own_gradients.keys()
    assert together.item() == pytest.approx(sum(one.item() for one in nats), rel=1e-6)
    whole = torch.stack([gradient.norm() for gradient in own_gradients.values()]).norm()
    for parameter, gradient in own_gradients.items():
        # float32 is good to 1e-6 of a matrix. Some gradients are 0 but for rounding (a bias of keys): they count for
        # what they are in the whole.
        error = (packed_gradients[parameter] - gradient).norm() / (gradient.norm() + 1e-6 * whole)
        assert error < 1e-5, parameter


def test_positions_restart_with_each_sample_and_with_the_padding(packed):
    assert packed["position_ids"].tolist() == [
        [*range(19), *range(2), *range(11)],
        [*range(14), *range(1), *range(7), *range(10)],
    ]
    assert packed["sample_borders"].tolist() == [0, 19, 21, 32, 46, 47, 54, 64]
    assert "attention_mask" not in packed


def test_packed_rows_of_one_sample_each_are_rows_like_any_other(samples, tmp_path):
    import numpy as np

    rows = make_rows(tmp_path, samples, [[0], [2], [3, 4]])
    batch = to_tensors(rows.gather(np.array([0, 1])), pad_token_id=0, device=CPU)
    assert batch.keys() == {"input_ids", "labels", "attention_mask", "label_places"}
    assert batch["attention_mask"].sum(1).tolist() == [19, 11]
    assert "sample_borders" in to_tensors(rows.gather(np.array([0, 2])), pad_token_id=0, device=CPU)


def test_first_token_of_a_sample_is_never_predicted(packed):
    assert set(packed["labels"][packed["position_ids"] == 0].tolist()) == {-100}
