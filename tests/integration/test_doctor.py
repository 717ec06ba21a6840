"""The doctor on real clusters: two nodes with a real all-reduce, a node that never answers, and what Slurm forms."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.integration import door, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
SHIMS = {
    "scontrol": "printf 'node1\\nnode2\\n'",
    # Runs here what Slurm would run there. Nodes on one host must not take each other's ports.
    "srun": """
while [[ $1 == --* ]]; do shift; done
if [ "$1" = hostname ]; then echo "$OWN_ADDRESS"; exit; fi
exec "$@" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --object-store-memory=150000000
""",
}


def test_two_nodes_are_green_with_a_real_all_reduce_between_them(tmp_path):
    nodes = ray_nodes.Nodes(dict(os.environ))
    try:
        nodes.add()
        seen = nodes.run(
            sys.executable, "-m", "qlora_ray.doctor", "--json", f"ray.address={nodes.address}", "ray.num_workers=2",
            "ray.resources_per_worker={CPU: 2}", f"ray.storage_path={tmp_path}", check=False, timeout=150,
        )  # fmt: skip
        assert seen.returncode == 0, seen.stdout + seen.stderr
        rows = json.loads(seen.stdout)
        (reduced,) = [row for row in rows if row["check"] == "all-reduce"]
        assert "gloo over 2 nodes" in reduced["found"] and "GB/s" in reduced["found"]
        assert len([row for row in rows if row["check"] == "storage" and row["state"] == "ok"]) == 2
        assert [row["found"] for row in rows if row["check"] == "authentication"] == ["the cluster asks for a token"]
        assert list(tmp_path.iterdir()) == []  # the probes are gone
    finally:
        nodes.close()


def test_node_that_never_answers_costs_the_deadline_and_no_more(monkeypatch):
    import ray

    from qlora_ray.cluster import ask
    from qlora_ray.config import Config

    monkeypatch.setattr(ask, "gather", lambda question: time.sleep(300))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        nodes = ask.nodes_by_name()
        question = ask.Question(Config().model, None, ".probe", "", ask_hub=False)
        facts, silent = ask._ask_each(nodes, question, seconds=3)
        assert facts == {} and list(silent.values()) == ["no answer within 3 s"]  # not what comes after 300 s
    finally:
        ray.shutdown()


@pytest.fixture
def short():
    """Ray's sockets live in its folder, and their paths may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="qr", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_slurm_script_forms_a_cluster_checks_it_and_trains(tmp_path, short):
    """With shims for srun and scontrol: Slurm itself cannot run in a test."""
    for name, text in SHIMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "OWN_ADDRESS": ray_nodes.own_address(), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "3", "SLURM_GPUS_ON_NODE": "0",
        "RAY_TMPDIR": str(short),
    }  # fmt: skip
    script = subprocess.Popen(
        [ROOT / "clusters" / "slurm.sh", "-c", str(ROOT / "configs" / "quickstart.yaml"), "ray.num_workers=2",
         "ray.resources_per_worker={CPU: 2}", f"ray.storage_path={tmp_path}/runs", "ray.run_name=a",
         "training.max_steps=4", "training.eval_every_steps=9", "evaluation.num_prompts=0"],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert script.stdout is not None
        said = []
        for line in script.stdout:
            said.append(line)
            if line.startswith(("report ", "error:")):
                break
        assert script.wait(60) == 0, "".join(said)
        assert "all-reduce" in "".join(said) and "gloo over 2 nodes" in "".join(said)
        assert door.summary(tmp_path / "runs" / "a")["status"] == "done"
        assert not list(tmp_path.glob(".ray-token-*"))
    finally:
        for process in psutil.process_iter():  # what Slurm ends with the job
            if process.pid != os.getpid() and os.getsid(process.pid) == script.pid:
                process.send_signal(signal.SIGTERM)
