"""The run that the interrupted ones are compared with."""

import pytest

from tests.integration import many_runs


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_thread_a_worker():
    """As those have that are compared: the bits are those of one number of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def whole(storage, one_thread_a_worker):
    """An uninterrupted run."""
    from tests.chaos.test_faults import settings

    ended = many_runs.run(*settings(storage, "whole"))
    assert ended.returncode == 0, ended.stderr
    return storage / "whole"
