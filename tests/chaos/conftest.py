"""The run that the interrupted ones are compared with."""

import pytest

from tests.integration import door


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(storage):
    """An uninterrupted run."""
    from tests.chaos.test_faults import settings

    ended = door.run(*settings(storage, "whole"))
    assert ended.returncode == 0, ended.stderr
    return storage / "whole"
