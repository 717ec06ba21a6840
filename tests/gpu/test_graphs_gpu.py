"""Micro-batches launched as one CUDA graph: the bits of the same launched one by one."""

import pytest
import torch

from qlora_ray.worker import graphs
from tests.integration import engines, tiny_models

pytestmark = pytest.mark.gpu
GPT2 = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Of two widths in turn, with as many places as are trained on."""
    made = tiny_models.batch(seed)
    made = {name: values[:, : 24 - 8 * (seed % 2)] for name, values in made.items()}
    places = torch.nn.functional.pad(made["labels"][:, 1:] != -100, (0, 1)).flatten().nonzero().flatten()
    return {**made, "label_places": places}


def trained(family: str, sizes: dict, folder, recorded: bool, stage: int = 3):
    """Losses and weights after 10 steps with dropout."""
    base = tiny_models.save(family, folder / "base", **sizes)
    config = tiny_models.make_config(
        base, model={"lora_dropout": 0.1}, quantization={"compute_dtype": "bfloat16"}, ray={"num_workers": 1},
        deepspeed={"zero_stage": stage},
    )  # fmt: skip
    engine = engines.build(config, folder, device="cuda")
    assert engine.graphs is not None
    if not recorded:
        engine.graphs._record = lambda _: None
    losses = engines.train(engine, range(10), 1e-3, fixed=False, batch=batch)
    assert any(engine.graphs._recorded.values()) == recorded
    return losses, engine.weights()


@pytest.mark.parametrize(
    "family, sizes, stage",
    [("gpt2", GPT2, 3), ("gpt2", GPT2, 0), ("llama", {}, 3), ("olmo2", {}, 0), ("smollm3", {}, 3)],
)
def test_a_graph_gives_the_bits_of_its_kernels_one_by_one(
    family, sizes, stage, nccl, adding_in_one_order, tmp_path
):  # fmt: skip
    losses, weights = trained(family, sizes, tmp_path / "recorded", recorded=True, stage=stage)
    plain_losses, plain = trained(family, sizes, tmp_path / "plain", recorded=False, stage=stage)
    assert losses == plain_losses
    assert all(torch.equal(weights[name], value) for name, value in plain.items())


def test_more_shapes_than_are_recorded_go_on_one_by_one(nccl, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "MAX_SHAPES", 1)
    monkeypatch.setattr(graphs, "WIDTHS", 8)
    losses, _ = trained("llama", {}, tmp_path, recorded=True)
    assert all(loss == loss for loss in losses)
