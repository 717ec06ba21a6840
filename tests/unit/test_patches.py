"""Patches of Ray, torch, transformers, PEFT and bitsandbytes have their effect, and each patch has such a test."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qlora_ray
from benchmarks.patches import collect
from qlora_ray import libraries
from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.storage import open_folder
from tests.integration import tiny_models

PACKAGE, ROOT = Path(qlora_ray.__file__).parent, Path(__file__).parents[2]


def pinned() -> dict[str, str]:
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return {name: version for name, version in lines}


# The registry


def test_every_patch_has_a_test_that_it_bites_and_every_such_test_a_patch():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert set(re.findall(r'^@pytest\.mark\.bites\("(.*?)"\)', tests, re.MULTILINE)) == set(collect())


def test_every_patch_says_where_it_was_read_what_it_gains_and_when_it_may_go():
    for name, patch in collect().items():
        assert all((patch.what, patch.gains, patch.delete_when)), name
        assert patch.read_in in libraries.TESTED[patch.library], name


@pytest.mark.parametrize("library", libraries.TESTED)
def test_newest_tested_version_is_the_pinned_one_and_all_are_allowed(library):
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text()
    asked = Requirement(re.search(rf'"({library}(\[.*?\])?[><=].*?)"', text)[1])
    assert libraries.TESTED[library][1] == pinned()[library]
    assert all(version in asked.specifier for version in libraries.TESTED[library])


def private_names(path: Path) -> set[str]:
    """Names with one leading underscore that a module uses of others: imported, read, set, or asked for by string."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {part for part in (node.module or "").split(".") if part.startswith("_")}
        if isinstance(node, ast.Attribute) and not _is_own(node):
            found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr", "delattr"):
            found |= {one.value for one in node.args[1:2] if isinstance(one, ast.Constant)}
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_own(node)}
    return {name for name in found - own if re.match(r"_[a-z]", name)} - {"_exit"}


def _is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_bundled" not in path.parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_uses_what_a_library_keeps_to_itself_without_saying_so(path):
    if private_names(path):
        assert "Patch(" in path.read_text(), private_names(path)


# The note


def installed(**changed: str) -> dict[str, str]:
    return {name: newest for name, (_, newest) in libraries.TESTED.items()} | changed


def test_untested_versions_give_one_note_with_those_that_were_tested():
    assert libraries.untested(installed()) == []
    assert libraries.untested(installed(torch="2.11.0+cu130")) == []
    (note,) = libraries.untested(installed(torch="2.10.0", ray="2.60.1", peft="-"))
    assert note == (
        "the tests ran with other versions of: torch 2.10.0 (2.11.0 to 2.13.0), peft - (0.21.2), ray 2.60.1 (2.60.0). "
        "constraints.txt pins them."
    )


def test_a_run_shows_the_note():
    from qlora_ray.cluster import quick
    from qlora_ray.planning.hardware import Hardware
    from tests.unit import test_checks

    found = test_checks.changed("versions.torch", "2.13.0")
    found.driver["versions"].update(installed(deepspeed="0.20.0"))
    for facts in found.nodes.values():
        facts["versions"].update(found.driver["versions"])
    notes, *_ = quick.look_quickly(found, Config(), Hardware(2, 0, (), {"CPU": 2}, ({"CPU": 2},)), None)
    assert [note for note in notes if "deepspeed 0.20.0 (0.19.8)" in note]


# Ray


@pytest.mark.bites("worker.notice.PREEMPTION")
def test_a_notice_that_ray_train_gives_a_worker_is_seen(monkeypatch):
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
    from ray.train.v2.api.preemption import PreemptionInfo

    from qlora_ray.worker import notice

    assert "preemption_context" in context.TrainContext.__dataclass_fields__
    worker_context = SimpleNamespace(preemption_context=PreemptionContext(), get_world_rank=lambda: 0)
    monkeypatch.setattr(context, "_train_context", worker_context)
    assert notice._preemption_info() is None
    RayTrainWorker.mark_preempt(SimpleNamespace(), PreemptionInfo(1234, {"node": [1, 0]}))
    info = notice._preemption_info()
    assert (info.deadline_ms, info.preempted_ranks) == (1234, [0, 1])


def fit_of(config: Config, is_private: bool) -> Any:
    """What would train on two workers, without a Ray that has started."""
    from qlora_ray.driver.fit import Fit

    fit = Fit.__new__(Fit)
    fit._config, fit._folder, fit._network, fit._is_private = config, open_folder("/tmp/none"), {}, is_private
    fit._own, fit.channel, fit._measures, fit._use_gpu = None, None, False, False
    fit._resources, fit._num_workers = {"CPU": 1.0}, 2
    return fit


@pytest.mark.bites("driver.fit.FEWER_CALLBACKS")
def test_ray_train_is_given_no_needless_callback():
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from qlora_ray.driver.fit import NEEDLESS

    trainer = fit_of(Config(), is_private=True)._make_trainer()
    names = {type(one).__name__ for one in trainer._create_default_callbacks()}
    all_names = {type(one).__name__ for one in DataParallelTrainer._create_default_callbacks(trainer)}
    assert all_names - names == NEEDLESS and "BackendSetupCallback" in names
    assert "callbacks=self._create_default_callbacks()" in inspect.getsource(DataParallelTrainer.fit)


@pytest.mark.bites("driver.process_group.WITHOUT_TORCH")
def test_workers_are_joined_as_ray_trains_own_backend_joins_them():
    from ray.train.torch import TorchConfig, config

    from qlora_ray.driver import process_group

    ours, theirs = inspect.getsource(process_group), inspect.getsource(config._TorchBackend)
    for name in ("_set_torch_distributed_env_vars", "_setup_torch_process_group", "_shutdown_torch"):
        assert f"config.{name}(" in ours and name in theirs
    assert process_group.JoinAndLeave.share_cuda_visible_devices == config._TorchBackend.share_cuda_visible_devices
    assert TorchConfig().timeout_s == process_group.TIMEOUT_SECONDS
    signature = inspect.signature(config._setup_torch_process_group)
    assert list(signature.parameters) == ["backend", "world_rank", "world_size", "init_method", "timeout_s"]


@pytest.mark.parametrize(
    "modules",
    [
        "driver.controller driver.process_group worker",
        "driver.start driver.fit driver.run driver.resume cluster.quick data.spread report",
    ],
    ids=["controller", "driver"],
)
def test_only_workers_import_torch(modules):
    code = (
        f"import sys, importlib; [importlib.import_module('qlora_ray.' + name) for name in {modules.split()}]\n"
        "import ray.train.v2.api.data_parallel_trainer\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.bites("driver.controller.CAUSES")
def test_causes_are_told_from_what_ray_train_raises():
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal import exceptions

    from qlora_ray.driver.controller import likely_cause

    def failed(inner: Exception) -> Exception:
        return exceptions.WorkerHealthCheckFailedError("worker", inner)

    assert likely_cause({0: failed(ActorDiedError())}) == "worker 0 died"
    assert likely_cause({1: failed(exceptions.WorkerHealthCheckTimeoutError("slow"))}) == "worker 1 froze"
    raised = exceptions.UserExceptionWithTraceback(ValueError("bad row"), "Traceback ...")
    assert likely_cause({0: raised}) == "worker 0: ValueError: bad row"
    preempted = ActorDiedError()
    assert preempted.preempted is False


@pytest.mark.bites("driver.controller.HOOKS")
def test_ray_train_calls_each_hook_of_save_before_resize():
    from ray.train.v2._internal.execution.controller import controller
    from ray.train.v2._internal.execution.worker_group import worker_group

    from qlora_ray.driver.controller import SaveBeforeResize

    source = inspect.getsource(controller) + inspect.getsource(worker_group)
    ours = {name: one for name, one in vars(SaveBeforeResize).items() if re.match(r"(before|after)_", name)}
    assert len(ours) == 3
    for name, hook in ours.items():
        theirs = [getattr(base, name) for base in SaveBeforeResize.__bases__ if hasattr(base, name)]
        assert [list(inspect.signature(one).parameters) for one in theirs] == [list(inspect.signature(hook).parameters)]
        assert re.search(rf'"{name}"|callback\.{name}\(', source), name
    assert "num_workers" in controller.ResizeDecision.__dataclass_fields__


@pytest.mark.bites("driver.controller.WHOLE_GROUPS")
def test_elastic_runs_have_as_many_workers_as_make_whole_groups(monkeypatch):
    from ray.train import ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from qlora_ray.driver import controller
    from qlora_ray.driver.controller import OwnMachine, WholeGroups

    given = {}
    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", lambda self, **what: given.update(what))
    policy = WholeGroups(ScalingConfig(num_workers=(2, 6), resources_per_worker={"CPU": 1}), 2)
    for free, expected in ((7, 6), (5, 4), (3, 2), (1, 0)):
        assert policy._count_possible_workers({"node": {"CPU": free}}) == expected
    config = Config.model_validate({"ray": {"num_workers": [2, 6]}, "training": {"sequence_parallel": 2}})
    monkeypatch.setattr(controller, "run_here", given.update)
    for is_private, expected in ((False, WholeGroups), (True, OwnMachine)):
        fit = fit_of(config, is_private)
        fit._make_trainer()._initialize_and_run_controller(scaling_policy=None)
        assert isinstance(given["scaling_policy"], expected)


@pytest.mark.bites("driver.controller.IN_THE_DRIVER")
def test_workers_are_told_what_ray_trains_own_controller_tells_them(monkeypatch):
    import ray
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from qlora_ray.driver.controller import OwnController, OwnGroup

    def told_by(group_class: type) -> list[dict]:
        told: list[dict] = []
        actor = SimpleNamespace(init_train_context=SimpleNamespace(remote=lambda **given: told.append(given)))
        group = group_class.__new__(group_class)
        group._train_run_context, group._storage_context, group._worker_callbacks_to_propagate = "run", "storage", []
        group._decorate_worker_log_file_paths = lambda _: None
        workers = [SimpleNamespace(actor=actor, distributed_context=rank) for rank in (0, 1)]
        group._init_train_context_on_workers(workers, "sync", {"checkpoint": ["a", "b"]})
        return told

    monkeypatch.setattr(ray, "get", lambda _: None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(current_actor=None))
    assert told_by(OwnGroup) == told_by(WorkerGroup) and len(told_by(OwnGroup)) == 2
    assert TrainController.worker_group_cls is WorkerGroup and OwnController.worker_group_cls is OwnGroup
    source = inspect.getsource(DataParallelTrainer._initialize_and_run_controller)
    assert "controller.run.remote()" in source and "controller.get_result.remote()" in source


@pytest.mark.bites("driver.controller.OWN_MACHINE")
def test_a_machine_of_our_own_is_asked_for_without_the_coordinator(monkeypatch):
    from ray.train import ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, scaling_policy

    from qlora_ray.driver.controller import OwnMachine

    asked: list[str] = []
    client = SimpleNamespace(
        send_resource_request=lambda *_: asked.append("room"),
        maybe_send_resource_request=lambda *_: asked.append("room"),
    )
    monkeypatch.setattr(scaling_policy, "TrainAutoscalingCoordinatorClient", lambda _: client)
    for policy_class, expected in ((FixedScalingPolicy, ["room", "room"]), (OwnMachine, [])):
        policy = policy_class(ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}))
        policy.after_controller_start(SimpleNamespace(run_id="1"))
        assert policy.make_decision_for_non_running_worker_group().num_workers == 2
        assert asked == expected
        asked.clear()


@pytest.mark.bites("driver.controller.FRESH_NODES")
def test_the_coordinator_looks_at_the_nodes_when_it_is_told_to():
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as its
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as client

    looks: list[int] = []
    actor = its._AutoscalingCoordinatorActor(
        send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: looks.append(1) or []
    )
    looks.clear()
    actor.get_reserved_resources("")
    assert looks == []
    actor.get_reserved_resources("", recompute=True)
    assert looks
    assert client.get_or_create_autoscaling_coordinator is its.get_or_create_autoscaling_coordinator  # the same actor


@pytest.mark.bites("cluster.connect.ADDRESS")
def test_the_cluster_of_this_machine_is_the_one_that_ray_would_take(monkeypatch):
    from ray._private import services, worker

    from qlora_ray.cluster import connect

    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert connect._resolved("auto") == "10.1.2.3:6379"
    assert "services.canonicalize_bootstrap_address(address" in inspect.getsource(worker.init)
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda *_: None)
    with pytest.raises(ConfigError, match="no Ray runs"):
        connect._resolved("auto")


@pytest.mark.bites("cluster.connect.SETTINGS")
def test_ray_reads_each_variable_that_is_set_for_it(monkeypatch):
    import os

    import ray

    from qlora_ray.cluster import connect
    from qlora_ray.sweep.run import TUNE_SETTINGS

    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "10.1.2.3:6379"})
    elastic = Config.model_validate({"ray": {"num_workers": [1, 2]}})
    connect.set_environment(elastic, debug=False)
    monkeypatch.setattr(os, "environ", private := {})
    connect.set_environment(Config(), debug=False)
    ours = {name for name in {*os.environ, *private} if name.startswith(("RAY_", "TORCH_"))} | TUNE_SETTINGS.keys()
    folder = Path(ray.__file__).parent
    places = ("train", "tune", "air", "_private", "_common")
    source = "".join(path.read_text() for place in places for path in (folder / place).rglob("*.py"))
    raylet = (folder / "core/src/ray/raylet/raylet").read_bytes()
    assert {name for name in ours if f'"{name}"' not in source and name.encode() not in raylet} == set()


@pytest.mark.bites("environment.SUBMITTED_JOB")
def test_ray_leaves_the_runtime_env_of_a_job_where_it_is_read():
    from ray._private import worker
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    from qlora_ray import environment

    assert environment.JOB_CONFIG == RAY_JOB_CONFIG_JSON_ENV_VAR
    assert "if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ" in inspect.getsource(worker)


@pytest.mark.bites("sweep.tuning.OWN_NAMES")
def test_a_trial_that_takes_over_anothers_parameters_keeps_its_own_name(tmp_path):
    from ray.tune.schedulers import PopulationBasedTraining

    from qlora_ray.sweep.tuning import NamedPbt

    options = {"metric": "loss", "mode": "min", "hyperparam_mutations": {"lr": [1.0, 2.0]}, "time_attr": "step"}
    worse, better = (SimpleNamespace(config={"trial": name, "lr": 1.0}) for name in ("t0000", "t0001"))
    assert NamedPbt(**options)._get_new_config(worse, better)[0]["trial"] == "t0000"
    assert PopulationBasedTraining(**options)._get_new_config(worse, better)[0]["trial"] == "t0001"
    assert "self._get_new_config(trial, trial_to_clone)" in inspect.getsource(PopulationBasedTraining._exploit)


# torch


@pytest.mark.bites("worker.engine.FOUND_INF")
def test_a_fused_step_that_is_told_so_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    weight.grad = torch.full((8,), float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    state = optimizer.state[weight]
    assert torch.equal(weight.detach(), torch.ones(8)) and not state["exp_avg"].any() and state["step"] == 0
    weight.grad = torch.ones(8)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert state["step"] == 1 and not torch.equal(weight.detach(), torch.ones(8))


@pytest.mark.bites("model.attention.FLASH")
def test_torchs_flash_kernel_takes_the_borders_of_samples():
    from qlora_ray.model import attention

    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
                          "return_debug_mask"] and "scale" in names  # fmt: skip
    q = torch.empty(48, 4, 16, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(1, 1, 20, 6, dtype=torch.int32, device="meta")
    assert attention._attend_flash(q, q, q, mask, attention.Sight(0.25)).shape == q.shape
    assert attention._attend_flash(q, q, q, mask, attention.Sight(0.25, window=7)).shape == q.shape


# transformers, PEFT, bitsandbytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama"))


def load(folder: str):
    from qlora_ray.model.base import load_base

    config = tiny_models.make_config(folder)
    return load_base(config.model, config.quantization, "float32", torch.device("cpu"))


@pytest.mark.bites("model.base.PLAIN_LINEAR")
def test_falcons_layers_are_built_so_that_they_are_packed(tmp_path):
    from bitsandbytes.nn import Linear4bit
    from transformers.models.falcon import modeling_falcon

    kinds = [type(layer.self_attention.dense) for layer in load(tiny_models.save("falcon", tmp_path)).transformer.h]
    assert kinds == [Linear4bit] * 2
    assert "FalconLinear(" in inspect.getsource(modeling_falcon.FalconAttention)


@pytest.mark.bites("model.base.STAY_TRAINABLE")
def test_a_4_bit_layer_that_was_evaluated_still_gives_gradients(llama, monkeypatch):
    import bitsandbytes.nn.modules as its

    repacked: list[int] = []
    monkeypatch.setattr(its, "_convert_weight_packed_for_cpu", lambda *some: repacked.append(1) or some)
    monkeypatch.setattr(its, "has_avx512bf16", lambda: True)
    layer = load(llama).model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert not repacked
    layer.train()
    layer(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0
    layer.eval()
    layer.support_avx512bf16_for_cpu = True  # bitsandbytes reads it
    with torch.no_grad():
        layer(x.detach())
    assert repacked


@pytest.mark.bites("model.ops_plain.PACKED_FORMAT")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_weights_lie_as_the_kernel_reads_them(quant_type, double_quant):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(128, 256)
    packed, state = quantize_4bit(weight, compress_statistics=double_quant, quant_type=quant_type)
    scales = state.absmax
    if state.nested:
        assert state.state2.blocksize == 256
        scales = state.state2.code[scales.long()] * state.state2.absmax.repeat_interleave(256)[: len(scales)]
        scales = scales + state.offset
    bytes_ = packed.flatten().long()
    values = state.code[torch.stack((bytes_ >> 4, bytes_ & 15), 1).flatten()]  # a byte's first value is its high half
    ours = (values.view(-1, state.blocksize) * scales[:, None]).view(128, 256)
    assert state.nested == double_quant and state.blocksize == 64
    torch.testing.assert_close(ours, dequantize_4bit(packed, state), rtol=1e-6, atol=0)


@pytest.mark.bites("model.fused.OWN_FORWARD")
def test_transformers_calls_what_stands_in_the_place_of_layers_norm_and_head(llama, monkeypatch):
    from qlora_ray.model import fused, head, layer
    from qlora_ray.worker.loss import sum_of_nats
    from tests import fused_models

    model, called = fused_models.build(llama, torch.float32), []
    for kind in (layer._Layer, fused._LastNorm, head._Nats):
        plain = kind.forward
        monkeypatch.setattr(kind, "forward", staticmethod(lambda *a, p=plain, k=kind: called.append(k) or p(*a)))
    sum_of_nats(model, tiny_models.batch())
    assert called == [layer._Layer, layer._Layer, fused._LastNorm, head._Nats]


@pytest.mark.bites("worker.losses.BOXES")
def test_losses_of_images_do_not_bring_scipy():
    def imported(before: str) -> str:
        code = f"import sys; {before}; import transformers.modeling_utils; print('scipy.optimize' in sys.modules)"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    assert imported("pass") == "True" and imported("from qlora_ray.worker import losses; losses.load()") == "False"


@pytest.mark.bites("worker.connect.AT_ONCE")
def test_a_group_is_asked_to_connect_as_torch_asks_one_that_is_bound_to_a_device(monkeypatch):
    from torch.distributed import distributed_c10d

    from qlora_ray.worker.connect import connect

    asked = inspect.getsource(distributed_c10d._new_process_group_helper)
    assert "pg._get_backend(device_id)\n        eager_backend.eager_connect_single_device(device_id)" in asked
    assert callable(torch._C._distributed_c10d.Backend.eager_connect_single_device)
    connected, here = [], torch.device("cpu")
    backend = SimpleNamespace(eager_connect_single_device=lambda device: connected.append(device))
    group = SimpleNamespace(_get_backend=lambda device: {here: backend}[device])
    monkeypatch.setattr(distributed_c10d, "_get_default_group", lambda: group)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    connect()
    assert connected == [here]
