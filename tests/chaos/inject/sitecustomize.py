"""Faults inside a worker, for tests: with this folder on PYTHONPATH and QLORA_RAY_FAULT=<kind>:<rank>:<step>[:always].

Python imports this file when any process starts. It waits for the training loop to be imported and makes one worker
misbehave at the start of one optimizer step, once a run (a marker file remembers), or always.

sleep            the training thread sleeps for ever
skip             the worker leaves out a collective
raise            the worker raises a ValueError
guard            the worker raises a GuardError, as where its share of the model is not what it should be
refuse           the worker raises a ConfigError, as where its node lacks a file
oom              the worker raises torch.OutOfMemoryError
nan              the worker's loss is not a number; <step> may be <first>-<last>
cast             every worker casts its packed 4-bit weights as floats, as ZeRO-3 does; rank and step do not count
sync-<n>         the process kills itself before its n-th fsync or rename after that step (n even: before, odd: after)
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time

FAULT, MARKER = os.environ.get("QLORA_RAY_FAULT"), os.environ.get("QLORA_RAY_FAULT_MARKER", "")
LOOP = "qlora_ray.worker.loop"


def is_due(rank: int, step: int) -> bool:
    kind, which, when, *always = FAULT.split(":")
    first, _, last = when.partition("-")
    if rank != int(which) or not int(first) <= step <= int(last or first):
        return False
    if always:
        return True
    try:
        os.close(os.open(MARKER, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def misbehave(kind: str) -> None:
    import torch

    if kind == "sleep":
        time.sleep(10**6)
    elif kind == "raise":
        raise ValueError("made to fail")
    elif kind == "guard":
        from qlora_ray.errors import GuardError

        raise GuardError("made to find that the weights are wrong")
    elif kind == "refuse":
        from qlora_ray.errors import ConfigError

        raise ConfigError("model.base_model: made to be missing on one node")
    elif kind == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    elif kind == "skip":
        import torch.distributed as dist

        broadcast, calls = dist.broadcast, []
        dist.broadcast = lambda *a, **k: broadcast(*a, **k) if calls else calls.append(1)
    elif kind.startswith("sync-"):
        die_at_sync(int(kind.removeprefix("sync-")))


def die_at_sync(number: int) -> None:
    calls = [0]

    def wrapped(original):
        def call(*arguments, **options):
            mine, calls[0] = calls[0], calls[0] + 1
            if mine == number // 2 and number % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            if mine == number // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync, os.replace = wrapped(os.fsync), wrapped(os.replace)


def casting(engine: type) -> type:
    """An engine that casts packed bytes as ZeRO-3 does where bnb_4bit_quant_storage is float16."""
    import torch

    class Casting(engine):
        def __init__(self, model, *settings):
            for parameter in model.parameters():
                if hasattr(parameter, "quant_state"):
                    cast = parameter.data.view(-1).view(torch.float16).bfloat16().half()
                    parameter.data = cast.view(torch.uint8).view(parameter.shape)
            super().__init__(model, *settings)

    return Casting


def patch(loop) -> None:
    from torch import distributed

    of_step, sum_of_nats, kind = loop.MicroBatches.of_step, loop.sum_of_nats, FAULT.split(":")[0]
    if kind == "cast":
        from qlora_ray.worker import setup

        setup.Engine = casting(setup.Engine)
        return

    def of_step_with_fault(self, step, *more):
        is_now = is_due(distributed.get_rank(), step)
        if is_now and kind != "nan":
            misbehave(kind)
        factor = float("nan") if is_now and kind == "nan" else 1
        loop.sum_of_nats = lambda *arguments: sum_of_nats(*arguments) * factor
        return of_step(self, step, *more)

    loop.MicroBatches.of_step = of_step_with_fault


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != LOOP:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


if FAULT:
    sys.meta_path.insert(0, Finder())
