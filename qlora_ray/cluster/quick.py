"""The part of the doctor that `train` runs by itself: what would cost a run, in a moment, before anything is loaded."""

import os
from dataclasses import replace

from qlora_ray import environment, libraries
from qlora_ray.cluster.ask import ask
from qlora_ray.cluster.checks import QUICK
from qlora_ray.cluster.found import Found, look
from qlora_ray.cluster.needs import needs_of, refuse
from qlora_ray.config import Config
from qlora_ray.model.facts import ModelFacts
from qlora_ray.planning.hardware import Hardware
from qlora_ray.storage import Folder

SECONDS = 15  # a node's first task starts a process there


def ask_quickly(config: Config, folder: Folder, hardware: Hardware) -> Found:
    """What the nodes say, before a worker of the run takes memory there. Raises ConfigError."""
    return ask(config, folder, needs_of(config, hardware, None), SECONDS, quick=True)


def look_quickly(
    found: Found, config: Config, hardware: Hardware, base: ModelFacts | None
) -> tuple[list[str], dict[str, str], Hardware]:
    """Notes for the user, what tells the workers which network interface to use, and the hardware with its GPUs' sizes.

    Raises ConfigError if red.
    A node that does not answer in time is noted, not refused: it may only be slow.
    """
    found = replace(found, needs=needs_of(config, hardware, base))
    rows = look(found, QUICK)
    refuse(rows)
    notes = [f"{row.check} of node {row.node}: {row.found}. {row.todo}" for row in rows if row.state == "unknown"]
    notes += libraries.untested(found.driver["versions"])
    notes += [f"node {node} was not checked: {why}." for node, why in found.silent.items()]
    if found.authentication != "private" and (names := environment.kept_back(os.environ)):
        notes.append(f"not given to the workers, since they look like secrets: {', '.join(names)}.")
    sizes = [gpu["total_gib"] for facts in found.nodes.values() for gpu in facts["gpus"]]
    hardware = replace(hardware, gpu_gib=min(sizes)) if sizes and not found.silent else hardware
    interfaces = [facts["interface"]["name"] for facts in found.nodes.values() if facts["interface"]]
    return notes, environment.network(interfaces, os.environ) if len(found.nodes) > 1 else {}, hardware
