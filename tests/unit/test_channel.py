"""When a run gives up: what failed would fail again."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from qlora_ray.driver.channel import Channel
from qlora_ray.driver.controller import likely_cause
from qlora_ray.driver.fit import Fit
from qlora_ray.errors import ConfigError, ProcessDied
from qlora_ray.worker import train_worker
from qlora_ray.worker.messages import DEATH, FREEZE, Failed, Fatal, Refused, Stepped


@pytest.fixture
def channel():
    return Channel.__ray_metadata__.modified_class()


def fail(channel, step: int, cause: str) -> None:
    channel.tell(Stepped(step))
    channel.tell(Failed(cause))


def test_third_failure_of_one_kind_at_one_step_is_the_last(channel):
    for _ in range(2):
        fail(channel, 7, "worker 1: ValueError: x")
        assert channel.reason_to_give_up() is None
    fail(channel, 7, "worker 1: ValueError: x")
    assert "3 times after step 7, without progress: worker 1: ValueError: x" in channel.reason_to_give_up()


def test_progress_or_another_cause_between_failures_lets_a_run_go_on(channel):
    for step in (7, 7, 8, 8):
        fail(channel, step, "worker 1: ValueError: x")
        assert channel.reason_to_give_up() is None
    fail(channel, 8, "worker 0: OSError: y")
    assert channel.reason_to_give_up() is None


@pytest.mark.parametrize("end", [DEATH, FREEZE])
def test_processes_ended_from_outside_say_nothing_about_the_next_time(channel, end):
    for _ in range(9):
        fail(channel, 7, f"worker 1 {end}")
    assert channel.reason_to_give_up() is None


def test_what_trying_again_cannot_mend_ends_the_run_at_once(channel):
    channel.tell(Fatal("worker 1 is out of memory"))
    assert channel.reason_to_give_up() == "worker 1 is out of memory"


def test_what_the_user_must_change_ends_the_run_at_once(channel):
    channel.tell(Refused("model.base_model=x: no such folder"))
    assert channel.reason_to_give_up() == "model.base_model=x: no such folder"


def test_workers_wait_until_the_run_is_planned_or_called_off(channel):
    assert channel.wanted() == (None, False)
    run: Any = object()
    channel.take(run)
    assert channel.wanted() == (run, False)
    channel.call_off()
    assert channel.wanted() == (run, True)


def test_driver_plans_by_what_a_worker_has_measured_and_refuses_what_it_refuses(channel, monkeypatch):
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    fit = Fit.__new__(Fit)
    fit.channel = SimpleNamespace(measured=SimpleNamespace(remote=channel.measured))
    lives = iter([True, True, False])
    fit.is_running, fit.error = lambda: next(lives), OSError("no room")  # type: ignore[method-assign]
    facts: Any = object()
    for told in (None, facts, None):  # a worker that waits asks again
        channel.wanted(told)
    assert fit.measured() is facts
    channel.wanted(Refused("model.target_modules=vproj: matches no layer"))
    with pytest.raises(ConfigError, match="vproj: matches no layer"):
        fit.measured()
    with pytest.raises(ProcessDied, match="no room"):
        fit.measured()


def test_cause_is_the_error_that_the_others_follow_from():
    errors = {0: RuntimeError("[gloo] Connection closed by peer"), 1: ValueError("bad row\nmore")}
    assert likely_cause(errors) == "worker 1: ValueError: bad row"


@pytest.mark.parametrize("is_called_off", [True, False])
def test_worker_waits_for_the_others_to_connect_unless_the_run_is_called_off(channel, monkeypatch, is_called_off):
    begun, connected, ran = threading.Event(), threading.Event(), []
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr("qlora_ray.worker.connect.connect", lambda: begun.set() or connected.wait(60))
    monkeypatch.setattr("qlora_ray.worker.loop.run_worker", lambda run, _: ran.append((run, connected.is_set())))
    asked = {name: SimpleNamespace(remote=getattr(channel, name)) for name in ("reason_to_give_up", "wanted")}
    job = {"channel": SimpleNamespace(**asked), "use_gpu": True, "connects_early": True, "measures": None}
    run: Any = object()
    channel.take(run)
    worker = threading.Thread(target=train_worker, args=(job,))
    worker.start()
    assert begun.wait(30)
    if is_called_off:
        channel.call_off()
    else:
        connected.set()
    worker.join(60)
    assert not worker.is_alive() and ran == ([] if is_called_off else [(run, True)])
    connected.set()
