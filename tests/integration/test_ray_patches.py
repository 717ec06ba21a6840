"""What is read of a Ray that runs: its processes, whose its placement groups are, and whether it wants a token."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, time
import psutil
import ray
from ray.util.placement_group import placement_group, placement_group_table
from qlora_ray.cluster import authentication, connect
from qlora_ray.cluster.few_processes import few_processes

authentication.keep_token_private()
with few_processes(shows_logs=False, num_early=1):
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
processes = ray._private.worker._global_node.all_processes
(raylet,) = processes["raylet"]
agents = psutil.Process(raylet.process.pid).children()
(stand_in,) = [one for one in agents if any(part.endswith("no_agent.py") for part in one.cmdline())]
others = [one for one in agents if "DashboardAgent" in " ".join(one.cmdline()) or "agent.py" in one.cmdline()[-1]]
print(f"the processes: {sorted({*processes} - {'reaper'})}, {others}")
deadline, idle = time.monotonic() + 30, []
while not idle and time.monotonic() < deadline:
    idle = [one for one in psutil.Process(raylet.process.pid).children() if "ray::IDLE" in one.cmdline()]
    time.sleep(0.1)
has_own = any("start_worker.py" in argument for argument in psutil.Process(raylet.process.pid).cmdline())
print(f"the early: {len(idle)}, {has_own}, {ray.get(ray.remote(lambda: os.getpid()).remote()) == idle[0].pid}")
head = ray.get_runtime_context().gcs_address
ours = authentication.token()
print(f"the head: {authentication.ask(head, ours)}, {authentication.ask(head, 'another')}")

ray.get(placement_group([{"CPU": 1}]).ready())
(name,) = placement_group_table()
is_ours = name.endswith(ray.get_runtime_context().get_job_id())
connect.release_workers()
deadline = time.monotonic() + 30
while placement_group_table()[name]["state"] != "REMOVED" and time.monotonic() < deadline:
    time.sleep(0.1)
print(f"the group: {is_ours}, {placement_group_table()[name]['state']}")

before = connect.dead_processes()
os.kill(raylet.process.pid, signal.SIGKILL)
deadline = time.monotonic() + 30
while not connect.dead_processes() and time.monotonic() < deadline:
    time.sleep(0.05)
print(f"the dead: {before}, {connect.dead_processes()}", flush=True)
stand_in.wait(10)
print("the stand-in: ended", flush=True)
ray._private.worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
os._exit(0)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the script says of each thing, from a process of its own: it kills its Ray."""
    token = tmp_path_factory.mktemp("token") / "auth_token"
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": ""}
    command = [sys.executable, "-c", SCRIPT]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | own)
    assert ended.returncode == 0, ended.stderr
    return dict(line.split(": ", 1) for line in ended.stdout.splitlines() if line.startswith("the "))


@pytest.mark.bites("cluster.authentication.HARMLESS_QUESTION")
def test_rays_head_answers_a_question_before_anything_is_sent(said):
    assert said["the head"] == "takes ours, asks for a token"


@pytest.mark.bites("cluster.connect.GROUPS_OF_JOB")
def test_placement_groups_of_this_job_are_known_and_freed(said):
    assert said["the group"] == "True, REMOVED"


@pytest.mark.bites("cluster.connect.OWN_PROCESSES")
def test_process_of_the_private_ray_that_died_is_named(said):
    assert said["the dead"] == "[], ['raylet']"


@pytest.mark.bites("cluster.few_processes.FEWER_PROCESSES")
def test_private_ray_has_no_process_that_it_needs_not_and_leaves_none(said):
    assert said["the processes"] == "['gcs_server', 'raylet'], []"
    assert said["the stand-in"] == "ended"


@pytest.mark.bites("cluster.few_processes.FEWER_PROCESSES")
def test_process_that_is_there_before_it_is_asked_for_takes_the_first_task(said):
    assert said["the early"] == "1, True, True"
