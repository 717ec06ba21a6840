"""Marks split the time of steps into phases; what lies between steps belongs to none."""

import time

import torch

from qlora_ray.worker.stopwatch import Stopwatch


def test_time_belongs_to_the_phase_whose_mark_ends_it():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.02)  # between steps
        watch.start()
        time.sleep(0.01)
        watch.mark("data")
        time.sleep(0.03)
        watch.mark("forward")
    seconds = watch.take()
    assert seconds.keys() == {"data", "forward"}
    assert 0.02 <= seconds["data"] < seconds["forward"] and seconds["forward"] >= 0.06
    assert watch.take() == {}


def test_time_aside_is_taken_out_of_the_phase_around_it():
    watch = Stopwatch(torch.device("cpu"))
    with watch.aside("communication"):  # before the first step: belongs to nothing
        time.sleep(0.01)
    watch.start()
    time.sleep(0.01)
    with watch.aside("communication"):
        time.sleep(0.05)
    watch.mark("forward")
    seconds = watch.take()
    assert seconds.keys() == {"forward", "communication"}
    assert 0.05 <= seconds["communication"] < 0.1 and 0.01 <= seconds["forward"] < 0.05
