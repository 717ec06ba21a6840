"""Stands in for the dashboard agent of a private Ray: tells the raylet that there is none, and ends with it.

A script of few_processes.py, run without the package: it must start in a moment.
"""

import os
import sys
import time

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def main(session: str) -> None:
    """Write what Ray's own agent writes of ports that it does not serve, and wait."""
    for name in PORTS:
        path = os.path.join(session, f"{name}_{os.environ['RAY_NODE_ID']}")
        with open(f"{path}.new", "w") as file:
            file.write("-1")
        os.replace(f"{path}.new", path)
    raylet = os.getppid()
    while os.getppid() == raylet:
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1])
