"""Stands in for Ray's setup_worker.py in a private Ray: becomes the worker's process without importing Ray first.

A script of few_processes.py, run without the package. What it does not know it leaves to Ray's.
"""

import argparse
import json
import os
import sys

ENDS = ("--serialized-runtime-env-context", "--language")


def main(setup: str, arguments: list[str]) -> None:
    """Set the variables of the worker's environment, and become its process. `setup` is Ray's own script."""
    parser = argparse.ArgumentParser()
    for end in ENDS:
        parser.add_argument(end)
    told, worker = parser.parse_known_args(arguments)
    context = json.loads(told.serialized_runtime_env_context or "{}")
    variables = context.pop("env_vars", {})
    is_plain = context.pop("py_executable", sys.executable) == sys.executable and not any(context.values())
    if told.language != "PYTHON" or not is_plain or any("$" in value for value in variables.values()):
        os.execv(sys.executable, [sys.executable, setup, *arguments])
    os.environ.update(variables)
    os.execv(sys.executable, [sys.executable, *worker])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
