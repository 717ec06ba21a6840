"""How stretches of files are cut to the buffers that they pass through."""

from pathlib import Path

import pytest

from qlora_ray.model import staging
from qlora_ray.model.pieces import Stretch
from qlora_ray.model.tensors import Entry

ENTRY = Entry(Path("none"), "BF16", (1000,), 0, 2000)


@pytest.mark.parametrize(("buffer", "block"), [(100, 30), (100, 100), (64, 64), (10, 7), (5000, 300)])
def test_buffers_take_every_byte_once_in_order_and_never_more_than_they_hold(buffer, block, monkeypatch):
    monkeypatch.setattr(staging, "BUFFER", buffer)
    monkeypatch.setattr(staging, "BLOCK", block)
    stretches = tuple(Stretch(name, ENTRY, *ends) for name, ends in (("a", (3, 90)), ("b", (0, 1)), ("c", (50, 400))))
    loads = list(staging._loads(stretches, 2))
    parts = [part for parts in loads for part in parts]
    taken = [(one.name, byte) for one, first, last in parts for byte in range(first, last)]
    assert taken == [(one.name, byte) for one in stretches for byte in range(2 * one.start, 2 * one.stop)]
    sizes = [sum(last - first for _, first, last in parts) for parts in loads]
    assert all(size == buffer for size in sizes[:-1]) and 0 < sizes[-1] <= buffer
    assert all(0 < last - first <= block for _, first, last in parts)
