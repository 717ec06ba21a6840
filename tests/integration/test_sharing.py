"""However the base lies, whole on each worker or in shares, the adapter has the same bits."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from qlora_ray.config import base_model_path
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.apart import Apart
from qlora_ray.model.facts import read_facts
from qlora_ray.model.fused import fuse
from qlora_ray.model.load import load_shares
from qlora_ray.model.plain import plain_layers
from qlora_ray.planning import memory
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.memory import BYTES_PER_WEIGHT
from qlora_ray.planning.traffic import base_bytes
from qlora_ray.worker import deepspeed_patches as patches
from qlora_ray.worker import setup
from qlora_ray.worker.base import share_out
from qlora_ray.worker.loss import sum_of_nats
from qlora_ray.worker.stopwatch import Stopwatch
from tests.integration import engines, ranks, tiny_models
from tests.integration.ranks import Job
from tests.integration.test_sharded_load import peak_bytes

EMBEDDED = base_model_path("embedded")
WAYS = ("world", "replicate")


def jobs(base: str, **sections) -> list[Job]:
    return [Job(base, {**sections, "deepspeed": {"share_base": way}}) for way in WAYS]


@pytest.mark.bites("worker.deepspeed_patches.shares.OUT_OF_ZERO")
def test_a_base_in_shares_and_one_whole_on_each_worker_give_one_adapter(tmp_path):
    mixtral = tiny_models.save("mixtral", tmp_path / "mixtral", num_hidden_layers=4)  # more than slots
    gpt2 = tiny_models.save("gpt2", tmp_path / "gpt2")
    left = ranks.run(
        2, tmp_path / "run", *jobs(EMBEDDED), *jobs(gpt2, quantization={"compute_dtype": "bfloat16"}),
        *jobs(mixtral), *jobs(mixtral, model={"expert_lora": True}),
        *jobs(EMBEDDED, model={"modules_to_save": ["norm"], "new_tokens": ["<new>"]}),
        *jobs(EMBEDDED, model={"lora_variant": "dora", "lora_dropout": 0.0}),
        *jobs(tiny_models.save("opt", tmp_path / "opt")),
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


def test_three_workers_hold_a_third_of_weights_and_scales_each_and_train_the_same_adapter_resumed_or_not(tmp_path):
    sections = {"quantization": {"double_quant": False}, "deepspeed": {"share_base": "world"}}
    both = jobs(EMBEDDED, quantization={"double_quant": False})
    left = ranks.run(3, tmp_path / "run", *both, Job(EMBEDDED, sections, resumes_at=1))
    assert len({held.adapter for job in left for held in job}) == 1 and not any(held.error for held in left[0])
    facts = read_facts(EMBEDDED)
    for held in left[0]:
        lengths = [int(said.split()[0]) for name, said in held.shares.items() if name.startswith("layer")]
        assert len(lengths) == facts.num_layers
        packed = facts.num_linear_parameters * BYTES_PER_WEIGHT[False]
        assert packed <= 3 * sum(lengths) <= 1.02 * packed  # the rest are borders
    assert not any(name.startswith("layer") for held in left[1] for name in held.shares)


class Arrived:
    def wait(self) -> None:
        pass


def gather_of_one(out: torch.Tensor, part: torch.Tensor, **_) -> Arrived:
    """What a collective of one worker does; gloo lets go of tensors in a thread of its own, which no profile sees."""
    out.copy_(part)
    return Arrived()


def test_layers_are_put_together_one_at_a_time_and_what_is_waited_for_is_told(tmp_path, process_group, monkeypatch):
    cpu, sizes = torch.device("cpu"), {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    config = tiny_models.make_config(tiny_models.save("llama", tmp_path, **sizes))
    plan = engines.plan_of(config, engines.rows_of_batch(tmp_path / "cache"))
    apart, made = Apart(cpu), []

    def let_pass():
        base, _ = load_shares(config.model, config.quantization, "float32", cpu, apart)
        made.append(add_adapter(base, config.model, torch.float32, 0))
        fuse(made[0])
        made.append(share_out(made[0], apart, plan))

    alone = SimpleNamespace(**{**vars(torch.distributed), "all_gather_into_tensor": gather_of_one})
    with monkeypatch.context() as within:
        within.setattr("qlora_ray.model.apart.dist", alone)
        within.setattr("qlora_ray.model.stretches.dist", alone)
        peak, held = peak_bytes(let_pass)
    model, ring = made
    layer, end = ring.slabs[0].num_bytes, ring.ends.slabs[0].num_bytes
    slots, adapter = 3 * layer + end, 4 * sum(one.numel() for one in trainable(model).values())
    whole = 8 * layer + 2 * end  # one worker has all stretches
    assert held == pytest.approx(whole + slots + adapter, rel=0.1)
    assert held < peak <= held + 1.05 * end
    stopwatch = Stopwatch(cpu)
    ring.waiting = partial(stopwatch.aside, "communication")
    with torch.no_grad(), patches.gathered(list(model.parameters())):
        sum_of_nats(model, tiny_models.batch())
    stopwatch.mark("forward")
    assert stopwatch.take()["communication"] > 0


def test_layers_that_zero_brings_are_let_go_of_between_forward_and_backward(tmp_path, process_group, monkeypatch):
    monkeypatch.setattr(setup, "_loss", lambda *_: 0.0)  # ZeRO-3 remembers what it let go of in a pass without backward
    sizes = {"hidden_size": 512, "ffn_dim": 2048, "word_embed_proj_dim": 512, "num_hidden_layers": 3}
    base = tiny_models.save("opt", tmp_path / "base", **sizes)
    config = tiny_models.make_config(base, ray={"num_workers": 2})  # which share the base, as far as the plan knows
    asked = {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    engine = engines.build(config, tmp_path / "run", deepspeed_json={"zero_optimization": asked})
    first, *_, last = plain_layers(engine.module)
    packed = [parameter for parameter in first.parameters() if hasattr(parameter, "quant_state")]
    seen = []
    last.register_forward_hook(lambda *_: seen.append([parameter.ds_status.name for parameter in packed]))
    engines.train(engine, range(3))
    assert len(packed) == 6 and [set(names) for names in seen] == [{"NOT_AVAILABLE"}] * 3


@pytest.mark.parametrize("is_tied", [False, True])
def test_what_a_micro_batch_brings_of_the_base_is_what_the_plan_tells(tmp_path, process_group, is_tied):
    cpu, sizes = torch.device("cpu"), {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5}
    base = tiny_models.save("llama", tmp_path / "base", **sizes, tie_word_embeddings=is_tied)
    config = tiny_models.make_config(base, ray={"num_workers": 2}, deepspeed={"share_base": "world"})
    plan = engines.plan_of(config, engines.rows_of_batch(tmp_path / "cache"))
    apart, brought = Apart(cpu), []
    loaded, _ = load_shares(config.model, config.quantization, "float32", cpu, apart)
    model = add_adapter(loaded, config.model, torch.float32, 0)
    fuse(model)
    ring = share_out(model, apart, plan)
    copies = ring._copies
    bring = copies.copy
    copies.copy = lambda slab, *rest: brought.append(slab.num_bytes) or bring(slab, *rest)
    for _ in range(2):  # the slots hold what the first leaves there
        brought.clear()
        with patches.gathered(list(model.parameters())):
            sum_of_nats(model, tiny_models.batch()).backward()
    known = memory.sizes(config, exact_facts(config), 0, 3, "float32")
    assert base_bytes(known, 2) == pytest.approx(sum(brought) / 2, rel=0.01)  # one of two gets half from the other
    assert plan.traffic.base == base_bytes(known, 2)
