"""Both answers of a pair behind one copy of their prompt: log-probabilities and gradients are those of two rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_ray.data.order import NO_ROW
from qlora_ray.data.rows import Rows
from qlora_ray.data.tokenize import Sample, _num_shared
from qlora_ray.model.families import FAMILIES
from qlora_ray.planning.rows import PACKED_MODEL_TYPES
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.loss import log_probabilities
from tests import fused_models
from tests.integration import tiny_models
from tests.made_rows import make_rows

CPU = torch.device("cpu")
WINDOW = {"sliding_window": 6}  # shorter than a prompt
MODELS = {name: (name, {}) for name in sorted(PACKED_MODEL_TYPES)} | {
    f"{name}, sliding window": (name, {**WINDOW, **more})
    for name, more in {
        "mistral": {}, "phi3": {}, "gemma2": {}, "gemma3_text": {},
        "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
        "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    }.items()
}  # fmt: skip
PAIRS = [(9, 5, 7), (2, 1, 9), (14, 8, 3), (4, 2, 2)]  # tokens of prompt, chosen and rejected


def samples() -> list[Sample]:
    """A prompt, its chosen and its rejected answer; the last pair differs from its first token on."""
    random = torch.Generator().manual_seed(0)
    made = []
    for number, lengths in enumerate(PAIRS):
        prompt, *answers = (torch.randint(3, 2048, (length,), generator=random).tolist() for length in lengths)
        prompts = [prompt, [3, *prompt[1:]] if number == len(PAIRS) - 1 else prompt]
        both = [
            Sample(own + answer, [(len(own), len(own + answer))], False)
            for own, answer in zip(prompts, answers, strict=True)
        ]
        made += [both[0], replace(both[1], num_shared=_num_shared(*both))]
    return made


def batch_of(rows: Rows, *numbers: int) -> dict[str, torch.Tensor]:
    return to_tensors(rows.gather(np.array(numbers)), pad_token_id=0, device=CPU)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """All pairs in two rows, and a row that does not count."""
    rows = make_rows(tmp_path_factory.mktemp("shared"), samples(), [[0, 1, 2, 3], [4, 5, 6, 7]], pairs="shared")
    batch = batch_of(rows, 0, 1, NO_ROW)
    assert np.count_nonzero(batch["num_shared"]) == 5  # three pairs, and the two of the row that does not count
    return batch


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Each sample in a row of its own."""
    rows = make_rows(tmp_path_factory.mktemp("apart"), samples(), [[0, 1], [2, 3], [4, 5], [6, 7]], False, "apart")
    return batch_of(rows, 0, 1, 2, 3)


def found(model, batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, tokens, and the gradient of a sum that weighs each answer otherwise."""
    model.zero_grad()
    log_probs, num_tokens = log_probabilities(model, batch)
    (log_probs * torch.linspace(1, 2, len(log_probs))).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return log_probs.detach(), num_tokens, gradients


def same(model, shared, apart, tolerance: float) -> None:
    ours, theirs = found(model, shared), found(model, apart)
    assert torch.equal(ours[1], theirs[1])
    assert ours[0].tolist() == pytest.approx(theirs[0].tolist(), rel=1e-6, abs=1e-6)
    assert ours[2].keys() == theirs[2].keys() and fused_models.error(ours[2], theirs[2]) < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_answers_behind_one_prompt_are_those_behind_two(name, shared, apart):
    family, more = MODELS[name]
    own = tiny_models.FAMILIES[family]
    sizes = own if family == "gpt2" else {**tiny_models.SIZES, **own, **more}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    for attention in ("eager",) if family == "gemma2" else ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        same(model, shared, apart, 1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fused_layers_read_a_shared_prompt_as_two(family, shared, apart, tmp_path):
    model = fused_models.build(fused_models.save(family, tmp_path), torch.float32)
    same(model, shared, apart, 1e-5)
    with torch.no_grad(), model.disable_adapter():
        ours, theirs = (log_probabilities(model, batch)[0] for batch in (shared, apart))
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-6, abs=1e-6)
