"""Saves that are killed at every sync and rename: python -m tests.chaos.killed_saves FOLDER KEEP.

Each save runs in a forked child that kills itself before (even number) or after one fsync or rename. Whatever the
moment, a whole checkpoint is left, and what else was left is in nobody's way. Prints the number of moments.
"""

import os
import sys
from pathlib import Path

import torch

from qlora_ray.storage import Folder, open_folder
from qlora_ray.worker.checkpoint import load_latest, save
from qlora_ray.worker.state import MOMENTS, AdapterState
from tests.chaos.inject.sitecustomize import die_at_sync


def state(step: int) -> AdapterState:
    torch.manual_seed(step)
    weights = {f"layer.{i}.lora_A.default.weight": torch.randn(4, 8) for i in range(2)}
    moments = {name: {key: torch.rand(4, 8) for key in MOMENTS} for name in weights}
    return AdapterState(weights, moments, optimizer_step=step, loss_scale=None)


def step_left(folder: Folder) -> int:
    """The step from which a run would go on."""
    found = load_latest(folder, set_aside=True)
    assert found is not None
    return found.progress["step"]


def is_killed(number: int, folder: Folder, keep: int) -> bool:
    """Save step 10 in a child that kills itself at this moment; whether there was such a moment."""
    child = os.fork()
    if child == 0:
        die_at_sync(number)
        save(folder, state(10), {"step": 10}, keep)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main() -> None:
    place, keep = Path(sys.argv[1]), int(sys.argv[2])
    for number in range(200):
        folder = open_folder(str(place / str(number)))
        save(folder, state(5), {"step": 5}, keep)
        killed = is_killed(number, folder, keep)
        assert step_left(folder) in (5, 10), number
        if not killed:
            assert step_left(folder) == 10
            print(number)
            return
        save(folder, state(15), {"step": 15}, keep)
        assert step_left(folder) == 15, number
        assert not [name for name in (folder / "checkpoints").list() if name.startswith(".")], number
    raise AssertionError("the save never ended")


if __name__ == "__main__":
    main()
