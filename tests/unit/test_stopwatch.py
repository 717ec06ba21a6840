"""Marks split the time of steps into phases; what lies between steps belongs to none."""

import time

import pytest
import torch

from qlora_ray.worker.stopwatch import Stopwatch


@pytest.fixture
def sleep(monkeypatch):
    """Lets time pass on a clock that nothing else moves."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def let_pass(seconds: float) -> None:
        clock[0] += seconds

    return let_pass


def test_time_belongs_to_the_phase_whose_mark_ends_it(sleep):
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        sleep(16)  # between steps
        watch.start()
        sleep(1)
        watch.mark("data")
        sleep(4)
        watch.mark("forward")
    assert watch.take() == {"data": 2, "forward": 8}
    assert watch.take() == {}


def test_time_aside_is_taken_out_of_the_phase_around_it(sleep):
    watch = Stopwatch(torch.device("cpu"))
    with watch.aside("communication"):  # before the first step: belongs to nothing
        sleep(16)
    watch.start()
    sleep(1)
    with watch.aside("communication"):
        sleep(4)
    watch.mark("forward")
    assert watch.take() == {"forward": 1, "communication": 4}
