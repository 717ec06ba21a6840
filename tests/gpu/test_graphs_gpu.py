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


def trained(family: str, sizes: dict, folder, recorded: bool):
    """Losses and weights after 10 steps with dropout."""
    base = tiny_models.save(family, folder / "base", **sizes)
    config = tiny_models.make_config(
        base, model={"lora_dropout": 0.1}, quantization={"compute_dtype": "bfloat16"}, deepspeed={"zero_stage": 0}
    )
    engine = engines.build(config, folder, device="cuda")
    assert engine.graphs is not None
    if not recorded:
        engine.graphs._record = lambda _: None
    losses = engines.train(engine, range(10), 1e-3, fixed=False, batch=batch)
    assert any(engine.graphs._recorded.values()) == recorded
    return losses, engine.weights()


@pytest.mark.parametrize("family, sizes", [("gpt2", GPT2), ("llama", {}), ("olmo2", {}), ("smollm3", {})])
def test_a_graph_gives_the_bits_of_its_kernels_one_by_one(family, sizes, nccl, adding_in_one_order, tmp_path):
    losses, weights = trained(family, sizes, tmp_path / "recorded", recorded=True)
    plain_losses, plain = trained(family, sizes, tmp_path / "plain", recorded=False)
    assert losses == plain_losses
    assert all(torch.equal(weights[name], value) for name, value in plain.items())


def test_more_shapes_than_are_recorded_go_on_one_by_one(nccl, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "MAX_SHAPES", 1)
    monkeypatch.setattr(graphs, "WIDTHS", 8)
    losses, _ = trained("llama", {}, tmp_path, recorded=True)
    assert all(loss == loss for loss in losses)
