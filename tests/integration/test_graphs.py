"""What a graph of a micro-batch would repeat, computed without recording it: no GPU is needed for that."""

import numpy as np
import pytest
import torch

from qlora_ray.worker.graphs import Graphs
from tests.integration import engines, tiny_models

KEPT_AS_THEY_ARE = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


class Recomputed:
    """In the place of a recorded graph."""

    def __init__(self, graphs: Graphs):
        self._graphs = graphs

    def replay(self, batch: dict[str, torch.Tensor], num_summands: int):
        share = torch.tensor(float(np.float32(1) / np.float32(num_summands)))
        return self._graphs._compute(batch, share)


def from_the_third_on(graphs: Graphs, batch: dict[str, torch.Tensor]) -> Recomputed | None:
    """As `Graphs.of`."""
    graphs._seen["any"] += 1
    if graphs._seen["any"] <= 2:
        return None
    if not graphs._wholes:
        graphs._copy_weights()
    graphs._renew_weights()
    return Recomputed(graphs)


def batch(seed: int) -> dict[str, torch.Tensor]:
    made = tiny_models.batch(seed)
    places = torch.nn.functional.pad(made["labels"][:, 1:] != -100, (0, 1)).flatten().nonzero().flatten()
    return {**made, "label_places": places}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_pass_without_hooks_on_copies_of_the_weights_trains_as_the_engines_own(
    stage, process_group, monkeypatch, tmp_path
):
    monkeypatch.setattr(Graphs, "of", from_the_third_on)
    base = tiny_models.save("gpt2", tmp_path / "base", **KEPT_AS_THEY_ARE)
    config = tiny_models.make_config(
        base, model={"lora_dropout": 0.1}, quantization={"compute_dtype": "float32"}, ray={"num_workers": 1},
        deepspeed={"zero_stage": stage},
    )  # fmt: skip
    plain, ours = (engines.build(config, tmp_path / name) for name in ("plain", "ours"))
    losses = engines.train(plain, range(5), 1e-3, fixed=False, batch=batch)
    ours.record_graphs(widest=24)
    assert engines.train(ours, range(5), 1e-3, fixed=False, batch=batch) == pytest.approx(losses, rel=1e-6)
    weights = ours.weights()
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in plain.weights().items())
