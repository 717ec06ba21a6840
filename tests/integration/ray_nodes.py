"""A Ray cluster as `ray start` makes it: each node a process of its own on this machine, ended by pid alone."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
START_SECONDS = 60


class Nodes:
    """A head with dashboard and job API on loopback, and nodes that join; token authentication is on."""

    def __init__(self, environment: dict[str, str], num_cpus: int = 3):
        self.folder = Path(tempfile.mkdtemp(prefix="qr", dir="/tmp"))  # short: Ray's sockets live in it
        self.token_file = self.folder / "token"
        self.token_file.touch(0o600)
        self.token_file.write_text(secrets.token_hex(32))
        self.environment = {
            **environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_health_check_period_ms": "500",
        }  # fmt: skip
        self._num_cpus, self._processes = num_cpus, []
        port, self.dashboard_port = free_ports(2)
        self.address = f"{own_address()}:{port}"
        self.head = self._start(
            "--head", f"--port={port}", f"--dashboard-port={self.dashboard_port}", f"--temp-dir={self.folder}/ray"
        )
        self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{self.dashboard_port}"
        wait(lambda: is_open(self.dashboard_port), "the dashboard")

    def add(self, hides: Path | None = None) -> subprocess.Popen:
        """Start one more node; returns its process once it has joined.

        In place of the folder that it `hides` it has an empty one of its own, as a machine without the shared disk has.
        """
        before = self.alive()
        alone = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', hides) if hides else ()
        # A folder of its own: on one host, nodes with one session folder take job uploads from under each other.
        process = self._start(
            f"--address={self.address}", f"--temp-dir={self.folder}/n{len(self._processes)}", prefix=alone
        )
        wait(lambda: self.alive() - before, "a node")
        return process

    def alive(self) -> set[str]:
        """Ids of the nodes that the head takes for alive."""
        command = ("ray", "list", "nodes", "--filter", "state=ALIVE", "--format", "json")
        for _ in range(20):  # just after its start the head may not know yet
            listed = self.run(*command, check=False).stdout
            if listed.lstrip().startswith("["):
                return {node["node_id"] for node in json.loads(listed)}
            time.sleep(1)
        raise AssertionError(f"ray list nodes: {listed}")

    def kill(self, process: subprocess.Popen) -> None:
        """End a node at once, as a power cut does."""
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            if one.is_running():
                one.send_signal(signal.SIGKILL)
        process.wait(10)

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess:
        """Run a command of a user of the cluster to its end."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=check, timeout=timeout
        )

    def start(self, *command: str) -> subprocess.Popen:
        """Start a command of a user of the cluster."""
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def _start(self, *arguments: str, prefix: tuple = ()) -> subprocess.Popen:
        with open(self.folder / f"node{len(self._processes)}.log", "w") as log:
            process = subprocess.Popen(
                [
                    *prefix, BIN / "ray", "start", "--block", f"--num-cpus={self._num_cpus}", "--num-gpus=0",
                    "--object-store-memory=150000000", "--min-worker-port=0", "--max-worker-port=0",
                    "--dashboard-agent-listen-port=0", "--disable-usage-stats", *arguments,
                ],
                env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End all nodes and remove what they wrote."""
        for process in reversed(self._processes):
            if process.poll() is None:
                self.kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)


def wait(is_true, what: str, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"{what} not there after {seconds:g} s"
        time.sleep(0.2)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def own_address() -> str:
    """The address that Ray takes for this machine's."""
    from ray._private.services import get_node_ip_address

    return get_node_ip_address()
