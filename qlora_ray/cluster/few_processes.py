"""A private Ray without the processes that serve a cluster's people: dashboard, its agent, autoscaler, log monitor.

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
    "services.start_ray_process starts is told of another dashboard agent: no_agent.py",
    gains="three CPU seconds of every start, in one of which nothing else can start",
    delete_when="ray.init takes settings that leave them out",
)  # fmt: skip
AGENT = "--dashboard_agent_command="


@contextlib.contextmanager
def few_processes(shows_logs: bool) -> Iterator[None]:
    """Within, ray.init starts what runs tasks and actors alone; and what brings their output here, if asked."""
    from ray._private import services
    from ray._private.node import Node

    def start(command: list[str], *given: Any, **named: Any) -> Any:
        return start_process(list(map(_without_agent, command)), *given, **named)

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


def _without_agent(argument: str) -> str:
    if not argument.startswith(AGENT):
        return argument
    (session,) = [part for part in shlex.split(argument) if part.startswith("--session-dir=")]
    script = str(Path(__file__).with_name("no_agent.py"))
    return AGENT + subprocess.list2cmdline([sys.executable, "-IS", script, session.removeprefix("--session-dir=")])
