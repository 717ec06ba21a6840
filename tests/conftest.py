"""Fixtures shared by all tests: nothing reaches a network, and GPU tests skip where there is none."""

import os
import shutil
import signal
import tempfile

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", TOKENIZERS_PARALLELISM="false",
    HF_ASSETS_CACHE=tempfile.mkdtemp(prefix="assets"),
    RAY_worker_niceness="0",  # 15 by default: workers would get nothing of a machine that does something else beside
)  # fmt: skip
# A suite started in the background ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Instead of pyproject's timeout, with room for a machine twice as slow: a slow test is one of many runs, and so may be
# the fixtures of a module that starts processes, which is one that imports a helper for it.
SLOW_SECONDS, PROCESSES_SECONDS = 900, 600
PROCESSES = {f"tests.integration.{helper}" for helper in ("door", "many_runs", "ranks", "ray_nodes", "sweeps")}


def uses(item: pytest.Item, helpers: set[str]) -> bool:
    return any(getattr(one, "__name__", None) in helpers for one in vars(item.module).values())


def pytest_collection_modifyitems(items):
    for item in items:
        if not item.get_closest_marker("timeout"):
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
            elif uses(item, PROCESSES):
                item.add_marker(pytest.mark.timeout(PROCESSES_SECONDS))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["HF_ASSETS_CACHE"], ignore_errors=True)


def pytest_configure(config):
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
