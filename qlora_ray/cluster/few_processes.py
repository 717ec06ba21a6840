"""A private Ray without the processes that serve a cluster's people: dashboard, its agent, autoscaler, log monitor.

Nor does each of its workers import Ray twice, once for the variables of its environment.

Stands on four functions inside ray._private: FEWER_PROCESSES.
"""

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_ray.libraries import Patch

FEWER_PROCESSES = Patch(
    "ray", "2.60.0", "Node.start_monitor, start_api_server and start_log_monitor do nothing, and the raylet that "
    "services.start_ray_process starts is told of another dashboard agent (no_agent.py), of another script that sets a "
    "worker's environment up (start_worker.py), and how many it shall start before they are asked for",
    gains="three CPU seconds of every start, in one of which nothing else can start, and half of one of each process",
    delete_when="ray.init takes settings that leave them out",
)  # fmt: skip
AGENT, WORKER, EARLY = "--dashboard_agent_command=", "--python_worker_command=", "--num_prestart_python_workers="


@contextlib.contextmanager
def few_processes(shows_logs: bool, num_early: int) -> Iterator[None]:
    """Within, ray.init starts what runs tasks and actors alone; and what brings their output here, if asked.

    So many processes for them are there early, for those whose environment is that of ray.init.
    """
    from ray._private import services
    from ray._private.node import Node

    def start(command: list[str], *given: Any, **named: Any) -> Any:
        return start_process([_changed(argument, num_early) for argument in command], *given, **named)

    start_process = services.start_ray_process
    needless = ["start_monitor", "start_api_server", *([] if shows_logs else ["start_log_monitor"])]
    kept = {name: getattr(Node, name) for name in needless}
    services.start_ray_process = start
    for name in needless:
        setattr(Node, name, lambda node, **_: None)
    try:
        yield
    finally:
        services.start_ray_process = start_process
        for name, function in kept.items():
            setattr(Node, name, function)


def _changed(argument: str, num_early: int) -> str:
    """An argument of a process of Ray, for the raylet."""
    here = Path(__file__)
    if argument.startswith(AGENT):
        (session,) = [part for part in shlex.split(argument) if part.startswith("--session-dir=")]
        script, folder = str(here.with_name("no_agent.py")), session.removeprefix("--session-dir=")
        return AGENT + subprocess.list2cmdline([sys.executable, "-IS", script, folder])
    if argument.startswith(WORKER):
        python, setup, *worker = shlex.split(argument.removeprefix(WORKER))
        return WORKER + subprocess.list2cmdline([python, str(here.with_name("start_worker.py")), setup, *worker])
    return f"{EARLY}{num_early}" if argument.startswith(EARLY) else argument
