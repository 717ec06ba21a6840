"""Each check from facts to rows: what is green, what is red, and that a red row says what to do."""

import copy
import dataclasses
import json

import pytest

from qlora_ray import doctor, environment
from qlora_ray.cluster import bandwidth
from qlora_ray.cluster import node_facts as facts_module
from qlora_ray.cluster.checks import CHECKS, QUICK
from qlora_ray.cluster.found import Found, Needs, Row, look
from qlora_ray.cluster.needs import needs_of, refuse
from qlora_ray.config import Config, ModelConfig
from qlora_ray.errors import ConfigError
from qlora_ray.planning.early import facts_at_hand
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.offload import Passing

GPU = {"name": "H100", "total_gib": 80.0, "free_gib": 79.0, "driver": "580.65.06", "compute_capability": "9.0"}
NODE = {
    "versions": {"qlora_ray": "0.1.0", "python": "3.12.4", "torch": "2.13.0", "ray": "2.60.0"},
    "code": "abc",
    "gpus": [GPU, GPU],
    "cuda": "13.0",
    "nccl": "2.29.7",
    "interface": {"name": "eth0", "mbit": 100_000},
    "infiniband": ["mlx5_0"],
    "open_files": (1024, 1_048_576),
    "shm_free": 64 * 2**30,
    "disk_free": 500 * 2**30,
    "base": {"here": True, "why": "/models/llama"},
    "tools": {"cc": True, "Python.h": True},
    "storage": {"reads": True, "wrote": "x", "why": "", "driver_reads": True},
    "time": 0.0,
    "skew": 0.0,
}
NEEDS = Needs(True, "auto", 4, 40.0, 10 * 2**30, 2**30)
HELD = {"CPU": 16.0, "GPU": 2.0, "object_store_memory": 20 * 2**30}


def cluster(needs=NEEDS, **found) -> Found:
    """Two healthy GPU nodes, head and driver on the first."""
    nodes = {name: copy.deepcopy(NODE) for name in ("10.0.0.1", "10.0.0.2")}
    found = {"resources": dict.fromkeys(nodes, HELD), "authentication": "takes ours", "token_mode": 0o100600} | found
    return Found(driver=copy.deepcopy(NODE), nodes=nodes, needs=needs, **found)


def changed(path: str, value, needs=NEEDS, **more) -> Found:
    """The healthy cluster, but for one fact of its second node."""
    found = cluster(needs, **more)
    *above, last = path.split(".")
    facts = found.nodes["10.0.0.2"]
    for key in above:
        facts = facts[int(key) if key.isdigit() else key]
    facts[last] = value
    return found


def red(found: Found, checks=CHECKS) -> list[Row]:
    return [row for row in look(found, checks) if row.state == "bad"]


def test_healthy_cluster_is_green_in_every_check():
    reduced = {"backend": "nccl", "bytes_per_second": 2e11}
    found = cluster(all_reduce=reduced, stop_seconds=300)
    assert {row.state for row in look(found, CHECKS)} == {"ok"}
    seen = {row.check for row in look(found, CHECKS)}
    assert {"versions", "GPU", "CUDA", "bf16", "network", "all-reduce", "storage", "disk", "/dev/shm", "CPUs",
            "base model", "compiler", "clock", "authentication", "open files", "job stop"} <= seen  # fmt: skip


CPU = Needs(False, "auto", 2, None, 2**20, 2**20)
NO_COMPILER = dict.fromkeys(facts_module.tools(), False)
BROKEN = [
    ("versions.torch", "2.12.0", NEEDS, "versions", "torch 2.12.0 (driver 2.13.0)"),
    ("versions.python", "3.12.5", NEEDS, "versions", "python 3.12.5 (driver 3.12.4)"),
    ("code", "def", NEEDS, "versions", "code is def"),
    ("gpus", [], NEEDS, "GPU", "nvidia-smi shows none"),
    ("gpus.1.free_gib", 3.0, NEEDS, "GPU", "3.0 of 80.0 GiB free"),
    ("cuda", None, NEEDS, "CUDA", "without CUDA"),
    ("gpus.0.driver", "535.1", NEEDS, "CUDA", "driver 535.1"),
    ("gpus.0.compute_capability", "7.5", NEEDS, "bf16", "no bfloat16"),
    ("nccl", "2.27.0", NEEDS, "network", "different NCCL"),
    ("interface", None, NEEDS, "network", "no interface"),
    ("storage", {"reads": False, "wrote": None, "why": ""}, NEEDS, "storage", "does not see"),
    ("storage.driver_reads", False, NEEDS, "storage", "driver does not see"),
    ("disk_free", 2**20, NEEDS, "disk", "the run writes 10.00"),
    ("shm_free", 64 * 2**20, NEEDS, "/dev/shm", "/dev/shm has 0.06 free"),
    ("base", {"here": False, "why": "no folder /models/llama"}, NEEDS, "base model", "no folder"),
    ("tools.cc", False, NEEDS, "compiler", "Triton's kernels: no cc"),
    ("tools", {"cc": True, "Python.h": False}, NEEDS, "compiler", "Triton's kernels: no Python.h"),
    ("skew", -12.5, NEEDS, "clock", "12.5 s behind"),
    ("open_files", (1024, 4096), NEEDS, "open files", "at most 4,096"),
]


@pytest.mark.parametrize(("path", "value", "needs", "check", "found"), BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_wrong_on_one_node_is_one_red_row_that_names_it_and_says_what_to_do(path, value, needs, check, found):
    (row,) = red(changed(path, value, needs))
    assert row.check == check and found in row.found and row.todo
    assert row.node in ("10.0.0.2", "all")


@pytest.mark.parametrize(
    ("more", "check", "found"),
    [
        ({"silent": {"10.0.0.3": "no answer within 60 s"}}, "answer", "no answer"),
        ({"needs": dataclasses.replace(NEEDS, unfit="ray.num_workers=4: ...")}, "CPUs", "ray.num_workers=4"),
        ({"authentication": "open"}, "authentication", "without a token"),
        ({"token_mode": 0o100644}, "authentication", "mode 0644"),
        ({"all_reduce": {"why": "nccl: not done within 60 s"}}, "all-reduce", "not done"),
    ],
)
def test_what_is_wrong_with_the_whole_cluster_is_one_red_row(more, check, found):
    (row,) = red(cluster(**more))
    assert row.check == check and found in row.found and row.todo


def test_object_store_too_small_for_the_rows_ahead_is_red():
    held = {**HELD, "object_store_memory": 2**20}
    assert [row.check for row in red(cluster(resources={"10.0.0.1": HELD, "10.0.0.2": held}))] == ["/dev/shm"]


def test_slow_network_is_a_warning_not_a_refusal():
    found = cluster(all_reduce={"backend": "nccl", "bytes_per_second": 1e8})
    assert [row.state for row in look(found, CHECKS) if row.check == "all-reduce"] == ["unknown"] and not red(found)


PASSING = Passing(80, 0, 4e8, 3.5e10, 3.7e10, 6.9e10, seconds=10.0)  # 6.9 GB/s


@pytest.mark.parametrize(
    ("told", "state", "said"),
    [
        ({"disk": {"folder": "/d", "bytes_per_second": 7e9}}, "ok", "/d: 7.0 GB/s; the layers' weights need 6.9"),
        ({"disk": {"folder": "/d", "bytes_per_second": 2e9}}, "unknown", "/d: 2.0 GB/s; the layers' weights need 6.9"),
        ({"device": {"bytes_per_second": 5e9}}, "unknown", "5.0 GB/s; the layers' weights need 6.9"),
        ({"device": {"why": "no GPU on this node"}}, "ok", "no GPU on this node"),
        ({"device": {"why": "not done within 60 s"}}, "unknown", "not done within 60 s"),
    ],
)
def test_bandwidth_stands_beside_what_the_weights_that_pass_need(told, state, said):
    healthy = {"disk": {"folder": "/d", "bytes_per_second": 8e9}, "device": {"bytes_per_second": 5e10}}
    found = cluster(dataclasses.replace(NEEDS, passing=PASSING), bandwidth={"10.0.0.1": {**healthy, **told}})
    rows = {row.check: row for row in look(found, CHECKS) if row.check in ("disk speed", "host to GPU")}
    row = rows["disk speed" if "disk" in told else "host to GPU"]
    assert (row.state, row.found) == (state, said) and bool(row.todo) == (state != "ok") and len(rows) == 2


def test_network_that_is_slower_than_the_gathers_of_the_plan_is_told():
    needs = dataclasses.replace(NEEDS, gathered_per_second=3e9)
    reduced = {"backend": "nccl", "bytes_per_second": 2e9}
    (row,) = [one for one in look(cluster(needs, all_reduce=reduced), CHECKS) if one.check == "all-reduce"]
    assert row.state == "unknown" and "2.00 GB/s of bus bandwidth; workers that share the base gather 3.0" in row.found


def test_bandwidth_of_this_machine_is_that_of_its_disk_and_says_that_there_is_no_card(tmp_path):
    told = bandwidth.measure_here(str(tmp_path), has_gpu=False)
    assert told["disk"]["bytes_per_second"] > 1e6 and told["device"] == {"why": "no GPU on this node"}
    assert "No such file or directory" in bandwidth.of_disk(str(tmp_path / "none"))["why"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checks", [CHECKS, QUICK], ids=["doctor", "train"])
def test_run_on_cpus_asks_no_node_for_a_compiler(checks):
    assert red(changed("tools", NO_COMPILER, CPU), checks) == []


def test_nodes_without_gpus_need_none_of_what_gpus_need():
    found = changed("gpus", [])
    found.nodes["10.0.0.2"]["tools"] = NO_COMPILER
    held = {"10.0.0.1": HELD, "10.0.0.2": {**HELD, "GPU": 0}}
    assert red(dataclasses.replace(found, resources=held)) == []


def test_refusal_of_train_names_check_node_and_way_out():
    with pytest.raises(ConfigError) as refused:
        refuse(look(changed("versions.torch", "2.12.0"), QUICK))
    assert "versions of node 10.0.0.2: torch 2.12.0 (driver 2.13.0). Install" in str(refused.value)
    assert "qlora_ray.doctor" in str(refused.value)


def test_needs_of_a_run_are_those_of_its_plan():
    config = Config.model_validate({"ray": {"num_workers": 2}, "checkpoint": {"keep": 3}})
    needs = needs_of(config, Hardware(4, 2, nodes=({"CPU": 2}, {"CPU": 2})), facts_at_hand(config))
    trainable = 299_008  # r=16 on all linear layers of the embedded base
    assert needs.use_gpu and needs.num_workers == 2
    assert needs.storage_bytes == 4 * trainable * 12 + 2 * trainable * 4 + 32 * 2**20
    assert needs.object_store_bytes == 512 * 4 * 512 * 12  # micro-batches ahead x rows x tokens x three int32
    assert 0 < needs.worker_gib < 1


def test_facts_are_those_of_this_machine(tmp_path):
    import torch

    here = facts_module.gather(facts_module.Question(ModelConfig(), None, ".probe", "127.0.0.1", ask_hub=False))
    assert torch.__version__.startswith(here["versions"]["torch"]) and here["cuda"] == torch.version.cuda
    assert here["base"] == {"here": True, "why": "embedded"} and here["interface"]["name"] == "lo"
    assert json.loads(json.dumps(here)) is not None
    gone = facts_module.Question(ModelConfig(base_model=f"{tmp_path}/none"), None, ".probe", "1.2.3.4", ask_hub=False)
    facts = facts_module.gather(gone)
    assert facts["base"]["here"] is False and facts["interface"] is None


def test_probe_tells_shared_storage_from_a_folder_of_the_same_name(tmp_path, monkeypatch):
    from qlora_ray.storage import open_folder

    shared, other = open_folder(f"{tmp_path}/shared"), open_folder(f"{tmp_path}/other")
    (shared / ".probe").write_bytes(b".probe")
    ask = facts_module.Question(ModelConfig(), shared, ".probe", "127.0.0.1", ask_hub=False)
    seen = facts_module._probe(ask)
    assert seen["reads"] and (shared / seen["wrote"]).exists()
    monkeypatch.setattr(facts_module, "SEEN_WITHIN_SECONDS", 0.2)
    blind = facts_module._probe(dataclasses.replace(ask, storage=other))
    assert not blind["reads"] and other.list() == []


def test_one_interface_is_told_to_all_ranks_unless_the_user_chose():
    assert environment.network(["eth0", "eth0"]) == {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert environment.network(["eth0", "ens5"]) == {"NCCL_SOCKET_IFNAME": "=ens5,eth0"}
    assert environment.network(["eth0"], {"NCCL_SOCKET_IFNAME": "ib0"}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert environment.network([]) == {}


def test_ranks_are_grouped_by_node_and_ordered_by_gpu():
    """Ray Train gives the ranks; ZeRO's gathers cross nodes least if neighbours are on one."""
    from types import SimpleNamespace

    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    def worker(node, gpu):
        return SimpleNamespace(metadata=SimpleNamespace(node_id=node, accelerator_ids={"GPU": [gpu]}))

    mixed = [worker("a", "1"), worker("b", "1"), worker("a", "0"), worker("b", "0")]
    ranked = WorkerGroup._sort_workers_by_gpu_id_grouped_by_node(mixed)
    placed = [(one.metadata.node_id, one.metadata.accelerator_ids["GPU"][0]) for one in ranked]
    assert placed == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]


@pytest.mark.parametrize(("found", "code"), [(cluster(), 0), (changed("code", "x"), 2)])
def test_doctor_prints_a_table_or_json_and_its_exit_code_says_whether_all_is_green(monkeypatch, capsys, found, code):
    monkeypatch.setattr(doctor, "examine", lambda *_: look(found, CHECKS))
    assert doctor.main([]) == code
    table = capsys.readouterr().out
    assert "versions" in table and ("ready" in table) == (code == 0)
    assert doctor.main(["--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    assert {"check", "node", "state", "found", "todo"} == set(printed[0])


def test_doctor_refuses_a_bad_config_in_one_line(capsys):
    assert doctor.main(["training.lerning_rate=1"]) == 2
    assert "Did you mean training.learning_rate?" in capsys.readouterr().err
