"""Layers that are not fused, on a GPU: inputs in host memory change no bit, and a budget is kept."""

import dataclasses

import pytest
import torch

from qlora_ray.model.plain import keep_plain, plain_layers
from qlora_ray.model.recompute import Keep
from qlora_ray.model.stash import HostStash
from qlora_ray.worker import recomputation
from qlora_ray.worker.loss import sum_of_nats
from tests import fused_models
from tests.integration import engines, tiny_models

pytestmark = pytest.mark.gpu
WIDE = {
    "gpt2": {"n_embd": 1024, "n_layer": 8, "n_head": 16, "n_positions": 1024},
    "gpt_neox": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16,
                 "max_position_embeddings": 1024},
}  # fmt: skip


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "gemma2"])
def test_what_each_layer_keeps_changes_no_bit(family, stage, nccl, adding_in_one_order, tmp_path):
    base = tiny_models.save(family, tmp_path / "base")
    config = tiny_models.make_config(
        base, model={"lora_dropout": 0.1}, training={"recompute": "all"}, deepspeed={"zero_stage": stage}
    )
    found = []
    for number, levels in enumerate([(Keep.ALL,) * 2, (Keep.INPUT, Keep.ALL), (Keep.HOST, Keep.HOST)]):
        engine = engines.build(config, tmp_path / str(number), device="cuda")
        keep_plain(plain_layers(engine.module), levels, HostStash(torch.device("cuda")))
        found.append((engines.train(engine, range(4), 1e-3, fixed=False), engine.weights()))
    for losses, weights in found[1:]:
        assert losses == found[0][0]
        assert all(torch.equal(weight, found[0][1][name]) for name, weight in weights.items())


def peak_bytes(model) -> int:
    """Of two micro-batches of 8 rows of 1,024 tokens."""
    ids = torch.randint(3, 2048, (8, 1024), generator=torch.Generator().manual_seed(0)).cuda()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        sum_of_nats(model, {"input_ids": ids, "labels": ids}).backward()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_budget_between_the_leanest_and_all_is_filled_and_kept(family, share, nccl, tmp_path):
    config = tiny_models.make_config(tiny_models.save(family, tmp_path / "base", **WIDE[family]))
    plan = engines.plan_of(config, engines.rows_of_batch(tmp_path / "rows"), "cuda")
    plan = dataclasses.replace(plan, micro_batch_size=8, tokens_per_micro_batch=8 * 1024)
    model = fused_models.build(config.model.base_model, torch.bfloat16, "cuda")
    plan = recomputation.prepare(model, plan, torch.device("cuda"))
    layers, bounds = plain_layers(model), []
    for level in (Keep.HOST, Keep.ALL):
        keep_plain(layers, (level,) * len(layers), HostStash(torch.device("cuda")))
        bounds.append(peak_bytes(model))
    budget = bounds[0] + share * (bounds[1] - bounds[0])
    limited = config.model_copy(
        update={"training": config.training.model_copy(update={"memory_budget_gib": budget / 2**30})}
    )
    choice = recomputation.keep_what_fits(model, limited, plan, torch.device("cuda"))
    assert 0 < choice.levels.count(Keep.ALL) < len(layers)
    assert 0.8 * budget < peak_bytes(model) <= budget
