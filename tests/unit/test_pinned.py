"""Memory of the host for copies to a GPU; that it is locked, and to the byte, is for tests/gpu."""

from pathlib import Path

import pytest

from qlora_ray.model.pinned import host_memory


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 3 * 2**20 + 7])
def test_host_memory_has_the_bytes_that_are_asked_for_and_goes_with_its_last_view(num_bytes):
    memory = host_memory(num_bytes)
    assert memory.nbytes == num_bytes
    memory.fill_(7)
    view, place = memory[num_bytes // 2 :], memory.data_ptr()
    del memory
    assert (view == 7).all()
    if num_bytes > 2**20:
        assert is_mapped(place)
        del view
        assert not is_mapped(place)


def is_mapped(place: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= place < int(end, 16) for start, end in ranges)
