"""Each patch of DeepSpeed has its effect: an upgrade that turns one off, or moves what one reads, turns a test red."""

import uuid

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from qlora_ray.config import EMBEDDED_BASE
from qlora_ray.worker import deepspeed_patches as patches
from qlora_ray.worker.deepspeed_patches import hooks
from qlora_ray.worker.engine import Engine
from qlora_ray.worker.loss import sum_of_nats
from qlora_ray.worker.state import MOMENTS
from qlora_ray.worker.stopwatch import Stopwatch
from tests.integration import engines, tiny_models

KINDS = [
    (0, "float32", {}), (0, "bfloat16", {}), (0, "float16", {}), (2, "float32", {}), (2, "float16", {}),
    (2, "float32", {"offload_optimizer": "cpu"}), (3, "float32", {}), (3, "float16", {}),
]  # fmt: skip


@pytest.fixture
def build(process_group, monkeypatch, tmp_path):
    """Builds an engine, without the patches that are named."""

    def build_it(stage=3, dtype="float32", without=(), zero=None, **offload) -> Engine:
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed refuses float16 on CPUs, where PyTorch computes with it all the same.
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        for name in without:
            owner = patches if hasattr(patches, name) else hooks
            monkeypatch.setattr(owner, name, lambda *_: None)
        config = tiny_models.make_config(
            EMBEDDED_BASE,
            deepspeed={"zero_stage": stage, **offload},
            quantization={"compute_dtype": dtype},
            ray={"num_workers": 2},  # which share the base at stage 3
        )
        asked = {
            "zero_optimization": zero or {},
            **({"fp16": {"initial_scale_power": 8}} if dtype == "float16" else {}),
        }
        return engines.build(config, tmp_path / uuid.uuid4().hex, deepspeed_json=asked)

    return build_it


def count_calls(monkeypatch, owner, name) -> list:
    """What the function of this name was called with from now on."""
    calls, plain = [], getattr(owner, name)

    def counting(*arguments, **options):
        calls.append(arguments)
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.bites("worker.deepspeed_patches.start.SHARED_MEMORY")
def test_deepspeed_neither_compiles_nor_tries_a_collective_of_its_own_on_cpus(monkeypatch, process_group):
    import deepspeed
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    done: list[str] = []
    monkeypatch.setattr(ShareMemCommBuilder, "load", lambda _: done.append("compiled"))
    monkeypatch.setattr(
        deepspeed.ops, "_probe_compatible_ops", lambda: done.append("tried") or {ShareMemCommBuilder.NAME: True}
    )
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    build_shm_op()
    assert done == ["tried", "compiled"]
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__")
    patches.use_gloo_on_cpus()
    assert build_shm_op() is None and done == ["tried", "compiled"]


@pytest.mark.bites("worker.deepspeed_patches.start.NO_PASSES")
def test_an_engine_is_made_without_what_compiles_it(build, monkeypatch):
    from deepspeed.runtime import engine

    asked, registered = [], count_calls(monkeypatch, engine.DeepSpeedEngine, "register_compile_pass")
    monkeypatch.setattr(engine, "is_deepcompile_supported", lambda: asked.append(1) or True)  # as on GPUs
    build()
    assert not asked and not registered and engine.is_deepcompile_supported()
    monkeypatch.setattr(patches, "initialize", deepspeed.initialize)
    build()
    assert registered


@pytest.mark.bites("worker.deepspeed_patches.hooks.KNOWN_PARAMETERS")
@pytest.mark.parametrize("without, walks", [((), False), (("remember_parameters",), True)])
def test_a_step_walks_no_leaf_for_its_parameters(build, monkeypatch, without, walks):
    sharded = build(without=without)
    engines.train(sharded, range(1))
    walked = count_calls(monkeypatch, torch.nn.Module, "named_parameters")
    engines.train(sharded, range(1, 2))
    leaves = set(map(id, patches.leaves(sharded.module)))
    assert leaves and bool([module for module, *_ in walked if id(module) in leaves]) == walks


@pytest.mark.bites("worker.deepspeed_patches.hooks.SHORT_WALKS")
@pytest.mark.parametrize("without", [(), ("walk_past_leaves",)])
def test_a_forward_pass_visits_no_module_inside_a_leaf(build, monkeypatch, without):
    from deepspeed.runtime import engine

    sharded = build(without=without)
    visited = count_calls(monkeypatch, engine, "ensure_zero_ordered_dict")
    engines.train(sharded, range(1))
    inside = {id(part) for leaf in patches.leaves(sharded.module) for part in leaf.modules() if part is not leaf}
    outside = {id(module) for module in sharded.module.modules()} - inside
    assert {id(module) for (module,) in visited} == (outside | inside if without else outside)
    assert inside and not any(module._parameters._in_forward for (module,) in visited)  # unmarked as well


@pytest.mark.bites("worker.deepspeed_patches.hooks.PROFILER_RANGES")
def test_a_step_marks_no_ranges_for_profilers(build, monkeypatch):
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import nvtx

    sharded, ranges = build(), count_calls(monkeypatch, get_accelerator(), "range_push")
    engines.train(sharded, range(1))
    assert ranges == []
    monkeypatch.setattr(nvtx, "enable_nvtx", True)
    engines.train(sharded, range(1, 2))
    assert ranges


@pytest.mark.bites("worker.deepspeed_patches.hooks.DEBUG_PRINTS")
@pytest.mark.parametrize("without", [(), ("print_only_on_demand",)])
def test_prints_that_are_off_do_not_ask_for_the_rank(build, monkeypatch, without):
    from deepspeed.runtime.zero import partition_parameters

    printed = count_calls(monkeypatch, partition_parameters, "print_rank_0")
    sharded = build(without=without)
    printed.clear()
    engines.train(sharded, range(1))
    assert bool(printed) == bool(without)


@pytest.mark.bites("worker.deepspeed_patches.hooks.RESIDENT")
@pytest.mark.parametrize("without", [(), ("keep_resident",)])
def test_trained_parameters_stay_gathered_between_steps_however_large(build, without):
    sharded = build(without=without, zero={"stage3_param_persistence_threshold": 0})
    engines.train(sharded, range(1))
    wholes = sharded._parameters.values()
    wanted = ZeroParamStatus.NOT_AVAILABLE if without else ZeroParamStatus.AVAILABLE
    assert [whole.ds_status for whole in wholes] == [wanted] * len(wholes)


@pytest.mark.bites("worker.deepspeed_patches.optimizer.KNOWN_NORM")
@pytest.mark.parametrize("without", [(), ("take_norm_as_known",)])
def test_zero_3_computes_no_norm_of_its_own(build, monkeypatch, without):
    sharded = build(without=without)
    norms = count_calls(monkeypatch, sharded._engine.optimizer, "get_grad_norm_direct")
    engines.train(sharded, range(1))
    assert bool(norms) == bool(without)


@pytest.mark.bites("worker.deepspeed_patches.hooks.TIMED_GATHERS")
def test_gathers_in_forward_and_backward_are_timed(build):
    sharded, stopwatch = build(), Stopwatch(torch.device("cpu"))
    sharded.time_gathers(stopwatch)
    nats = sum_of_nats(sharded, tiny_models.batch())
    stopwatch.mark("forward")
    assert stopwatch.take()["communication"] > 0
    sharded.backward(nats)
    stopwatch.mark("backward")
    assert stopwatch.take()["communication"] > 0


@pytest.mark.bites("worker.deepspeed_patches.optimizer.OWN_GRADIENTS")
@pytest.mark.parametrize("stage, dtype, zero", KINDS)
def test_a_gradient_that_is_put_in_place_is_what_the_step_takes(build, stage, dtype, zero):
    engine = build(stage, dtype, **zero)
    before = engine.weights()
    engine.backward(sum_of_nats(engine, tiny_models.batch()))  # ZeRO-3 makes its buffers
    for number, parameter in enumerate(engine._parameters.values()):
        whole = torch.ones(patches.whole_shape(parameter)).flatten()
        whole[1::2] = -2.0
        engine._set_gradient(number, parameter, whole * engine._loss_scale())
    for group in engine._engine.optimizer.param_groups:
        group["lr"] = 0.5
    engine._engine.step()
    for name, weight in engine.weights().items():  # AdamW's first step is the learning rate against the sign
        step = (weight - before[name]).flatten()
        assert torch.allclose(step.abs(), torch.tensor(0.5), atol=1e-6), name
        assert torch.equal(step[1::2], step[1::2].abs()) and torch.equal(step[::2], -step[::2].abs())


@pytest.mark.bites("worker.deepspeed_patches.shares.SHARD_MARKS")
@pytest.mark.parametrize("stage, dtype, zero", KINDS)
def test_zero_marks_the_parameters_that_it_shards(build, stage, dtype, zero):
    sharded = build(stage, dtype, **zero)
    engines.train(sharded, range(1))
    for parameter in sharded._parameters.values():
        assert patches.has_shards(parameter) == (stage > 0)
        assert hasattr(parameter, "ds_shape") == (stage == 3)
    assert sum(weight.numel() for weight in sharded.weights().values()) == sharded._flat.numel


@pytest.mark.bites("worker.deepspeed_patches.optimizer.MASTERS")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stage_0_optimizes_float32_copies_that_are_found_by_their_parameter(build, dtype):
    sharded = build(0, dtype)
    engines.train(sharded, range(1))
    for parameter in sharded._parameters.values():
        master = patches.master_of(sharded._engine.optimizer, parameter)
        assert master is not parameter and master.dtype == torch.float32
        assert torch.equal(master.detach().to(parameter.dtype), parameter.detach())


@pytest.mark.bites("worker.deepspeed_patches.optimizer.OPTIMIZER_STATE")
@pytest.mark.parametrize("stage, dtype, zero", KINDS)
def test_state_goes_in_before_the_first_step_and_comes_out_as_it_was(build, stage, dtype, zero):
    first, second = build(stage, dtype, **zero), build(stage, dtype, **zero)
    engines.train(first, range(2), 1e-3)
    before = first.state()
    assert before.optimizer_step == 2  # and none that a wrapper made of zeros
    second.load_state(before)
    after = second.state()
    assert (after.optimizer_step, after.loss_scale) == (before.optimizer_step, before.loss_scale)
    for name, weight in before.weights.items():
        assert torch.equal(after.weights[name], weight)
        assert all(torch.equal(after.moments[name][key], before.moments[name][key]) for key in MOMENTS)
    assert any(moment.any() for both in before.moments.values() for moment in both.values())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_loss_scale_of_float16_survives_a_checkpoint_at_every_stage(build, stage):
    first, second = build(stage, "float16"), build(stage, "float16")
    engines.train(first, range(1), 1e-3)
    first._engine.optimizer.loss_scale = 32.0
    second.load_state(first.state())
    assert second._loss_scale() == 32.0
