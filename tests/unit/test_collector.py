"""Nothing is collected while modules load."""

import gc

import pytest

from qlora_ray import collector


def test_collector_is_off_within_and_on_again_after_whatever_happens():
    with collector.paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), collector.paused():
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()
