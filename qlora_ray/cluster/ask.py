"""Asks all nodes of the cluster at once, each with a deadline, and puts what they say together."""

import os
import time
import uuid
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora_ray import environment
from qlora_ray.cluster import authentication, connect
from qlora_ray.cluster.found import Found, Needs
from qlora_ray.cluster.node_facts import Question, gather
from qlora_ray.config import Config
from qlora_ray.storage import Folder

GET_SECONDS = 5


def ask(config: Config, storage: Folder, needs: Needs, seconds: float, quick: bool) -> Found:
    """What is known of the cluster after at most about `seconds`. Ray must have started.

    Quick: a private Ray is asked without starting a process, and object stores and hubs are not asked.
    """
    nodes = nodes_by_name()
    is_private = connect.address(config) is None
    asks_storage = not quick or (storage.is_local and len(nodes) > 1)
    question = Question(
        config.model, storage if asks_storage else None, f".probe-{uuid.uuid4().hex}",
        next(iter(nodes.values()))["NodeManagerAddress"], ask_hub=not quick,
    )  # fmt: skip
    if asks_storage:
        (storage / question.probe).write_bytes(question.probe.encode())
    silent: dict[str, str] = {}
    try:
        if quick and is_private:
            facts = {name: gather(question) for name in nodes}
        else:
            facts, silent = _ask_each(nodes, question, seconds)
        for one in facts.values():
            if asks_storage and one["storage"]["wrote"]:
                one["storage"]["driver_reads"] = (storage / one["storage"]["wrote"]).exists()
    finally:
        if asks_storage:
            for left in [name for name in storage.list() if name.startswith(question.probe)]:
                (storage / left).delete()
    mine = next(iter(facts.values())) if is_private and facts else gather(replace(question, storage=None))
    return Found(
        driver=mine, nodes=facts, needs=needs, silent=silent,
        resources={name: node["Resources"] for name, node in nodes.items()},
        authentication="private" if is_private else _authentication(), token_mode=_token_mode(),
        stop_seconds=int(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) if environment.in_job(os.environ) else None,
    )  # fmt: skip


def nodes_by_name() -> dict[str, dict[str, Any]]:
    """The live nodes by address, this one first; of several at one address also a part of the id."""
    here = ray.get_runtime_context().get_node_id()
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return {
        address if addresses.count(address) == 1 else f"{address} {node['NodeID'][:6]}": node
        for address, node in zip(addresses, nodes, strict=True)
    }


def on_node(node: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Options of a task or actor that runs on this node and takes no CPU."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return {"num_cpus": 0, "scheduling_strategy": strategy, **more}


def first_line(error: Exception) -> str:
    """The cause of a Ray error in one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _ask_each(nodes, question: Question, seconds: float) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Facts by node, and why the other nodes gave none."""
    task: Any = ray.remote(gather)
    began, deadline = time.time(), time.monotonic() + seconds
    waiting = {
        task.options(**on_node(node, max_retries=0)).remote(replace(question, address=node["NodeManagerAddress"])): name
        for name, node in nodes.items()
    }
    facts, silent = {}, {}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for answer in ray.wait(list(waiting), timeout=left, fetch_local=False)[0]:
            received, name = time.time(), waiting.pop(answer)
            try:
                facts[name] = ray.get(answer, timeout=GET_SECONDS)
            except RayError as error:
                silent[name] = first_line(error)
                continue
            said = facts[name]["time"]
            # Its clock is right if it read a moment between the question and the answer.
            facts[name]["skew"] = min(0.0, said - began) + max(0.0, said - received)
    for answer, name in waiting.items():
        ray.cancel(answer, force=True)
        silent[name] = f"no answer within {seconds:g} s"
    return {name: facts[name] for name in nodes if name in facts}, silent


def _authentication() -> str:
    return authentication.ask(ray.get_runtime_context().gcs_address, authentication.token())


def _token_mode() -> int | None:
    path = authentication.token_path()
    return path.stat().st_mode if path.is_file() else None
