"""What a worker group does when a node of it will be taken away."""

import time
from types import SimpleNamespace

import pytest

from qlora_ray.worker import notice


@pytest.fixture
def told(monkeypatch):
    """A Notice, what it tells, and the preemption that Ray Train knows of."""
    messages: list[str] = []
    info = SimpleNamespace(deadline_ms=None, preempted_ranks=[1])
    monkeypatch.setattr(notice, "_preemption_info", lambda: info)
    return notice.Notice(messages.append), messages, info


def test_nothing_happens_without_a_notice(monkeypatch):
    monkeypatch.setattr(notice, "_preemption_info", lambda: None)
    assert notice.Notice(pytest.fail).look(1.0) == (False, 0.0)


def test_notice_saves_at_once_and_holds_only_when_time_runs_out(told):
    notices, messages, info = told
    info.deadline_ms = (time.time() + 60) * 1000
    assert notices.look(5.0) == (True, 0.0)
    assert notices.look(5.0) == (False, 0.0)  # training goes on
    save, hold_until = notices.look(40.0)  # a step and a save would take too long now
    assert not save and hold_until > time.time() + 60
    assert notices.look(40.0) == (False, 0.0)  # the node has stayed after all
    assert messages == ["the node of worker 1 will be taken away in 60 s"]


def test_short_notice_saves_and_holds_together(told):
    notices, _, info = told
    info.deadline_ms = (time.time() + 3) * 1000
    save, hold_until = notices.look(1.0)
    assert save and hold_until > time.time()
