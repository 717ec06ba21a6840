"""However the base lies, whole on each worker or in shares, the adapter has the same bits."""

import pytest

from qlora_ray.config import base_model_path
from tests.integration import ranks, tiny_models
from tests.integration.ranks import Job

EMBEDDED = base_model_path("embedded")
WAYS = ("world", "replicate")


def jobs(base: str, **sections) -> list[Job]:
    return [Job(base, {**sections, "deepspeed": {"share_base": way}}) for way in WAYS]


@pytest.mark.bites("worker.deepspeed_patches.shares.OUT_OF_ZERO")
def test_a_base_in_shares_and_one_whole_on_each_worker_give_one_adapter(tmp_path):
    mixtral = tiny_models.save("mixtral", tmp_path / "mixtral", num_hidden_layers=1)
    gpt2 = tiny_models.save("gpt2", tmp_path / "gpt2")
    left = ranks.run(
        2, tmp_path / "run", *jobs(EMBEDDED), *jobs(gpt2, quantization={"compute_dtype": "bfloat16"}),
        *jobs(mixtral), *jobs(mixtral, model={"expert_lora": True}),
        *jobs(EMBEDDED, model={"modules_to_save": ["norm"], "new_tokens": ["<new>"]}),
    )  # fmt: skip
    for shared, whole in zip(left[::2], left[1::2], strict=True):
        # One small parameter stays with ZeRO-3, for transformers to ask for the device.
        assert all(len(held.shares) == 1 for held in whole) and all(len(held.shares) > 1 for held in shared)
        assert len({held.adapter for held in shared + whole}) == 1 and not any(held.error for held in shared + whole)
        assert [held.losses for held in shared] == [held.losses for held in whole]


def test_four_workers_on_two_nodes_train_one_adapter_whoever_holds_the_base_together(tmp_path):
    how = {"replicate": 1, "node": 2, "world": 2}  # and the nodes
    jobs = [Job(EMBEDDED, {"deepspeed": {"share_base": way}}, num_nodes=count) for way, count in how.items()]
    left = ranks.run(4, tmp_path / "run", *jobs)
    assert not any(held.error for job in left for held in job)
    assert len({held.adapter for job in left for held in job}) == 1
    assert len({tuple(held.losses) for job in left for held in job}) == 1
    whole, by_node, by_all = left
    assert all(len(held.shares) == 1 for held in whole)
    assert by_node[0].shares == by_node[2].shares and by_node[1].shares == by_node[3].shares  # each node all of it
    assert by_node[0].shares != by_node[1].shares and by_all[0].shares != by_all[2].shares
