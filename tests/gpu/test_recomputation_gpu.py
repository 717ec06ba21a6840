"""What layers keep, on a GPU: inputs in host memory change no bit where they are not fused, and a budget is kept."""

import dataclasses

import pytest
import torch

from qlora_ray.model.fused import fused_layers, keep
from qlora_ray.model.plain import keep_plain, plain_layers
from qlora_ray.model.recompute import Choice, Keep
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
    "opt": {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 8, "num_attention_heads": 16,
            "max_position_embeddings": 1024, "word_embed_proj_dim": 1024},
}  # fmt: skip
SHARE_OF_FORECAST = 0.95  # the plan is right within 5%


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("family", ["opt", "gpt_neox", "falcon", "gemma2"])
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


def peak_bytes(model, levels: tuple[Keep, ...]) -> int:
    """Of two micro-batches of 8 rows of 1,024 tokens, where layers keep this."""
    if fused_layers(model):
        keep(model, Choice(levels))
    else:
        keep_plain(plain_layers(model), levels, HostStash(torch.device("cuda")))
    ids = torch.randint(3, 2048, (8, 1024), generator=torch.Generator().manual_seed(0)).cuda()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        sum_of_nats(model, {"input_ids": ids, "labels": ids}).backward()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("family", WIDE)
def test_a_budget_between_the_leanest_and_all_is_kept_and_has_no_room_for_more(family, share, nccl, tmp_path):
    config = tiny_models.make_config(tiny_models.save(family, tmp_path / "base", **WIDE[family]))
    plan = engines.plan_of(config, engines.rows_of_batch(tmp_path / "rows"), "cuda")
    plan = dataclasses.replace(plan, micro_batch_size=8, tokens_per_micro_batch=8 * 1024)
    model = fused_models.build(config.model.base_model, torch.bfloat16, "cuda")
    plan = recomputation.prepare(model, plan, torch.device("cuda"))
    least, most = (peak_bytes(model, (level,) * 8) for level in (Keep.HOST, Keep.ALL))
    budget = least + share * (most - least)
    limited = config.model_copy(
        update={"training": config.training.model_copy(update={"memory_budget_gib": budget / 2**30})}
    )
    levels = recomputation.keep_what_fits(model, limited, plan, torch.device("cuda")).levels
    assert len(set(levels)) > 1
    assert peak_bytes(model, levels) <= budget, levels
    last = max(layer for layer, level in enumerate(levels) if level > Keep.ALL)
    more = (*levels[:last], Keep.ALL, *levels[last + 1 :])
    moments = 12 * plan.num_trainable_parameters  # which the budget leaves room for, and nobody makes here
    assert peak_bytes(model, more) > SHARE_OF_FORECAST * (budget - moments), levels


def test_what_is_parked_leaves_the_gpu_at_once_however_far_ahead_the_host_is_and_comes_back_as_it_was():
    stash, count, size = HostStash(torch.device("cuda")), 12, 2**24
    values = [torch.randn(size, device="cuda") for _ in range(count)]
    for turn in range(2):  # the first finds host memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda._sleep(10**9)  # half a second, in which the host parks everything
        for slot, value in enumerate(values):
            stash.put(slot, value + turn)
        taken = torch.cuda.max_memory_allocated() - before
        for slot in reversed(range(count)):
            assert torch.equal(stash.take(slot), values[slot] + turn)
    assert taken <= 4 * values[0].nbytes
