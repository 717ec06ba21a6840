"""Host memory that a GPU copies from and to: exactly as much as is asked for, where torch's own comes in powers of two.

In large pages where the system has them, which are mapped and locked many times faster than small ones.
"""

import contextlib
import mmap
import weakref

import torch


def host_memory(num_bytes: int) -> torch.Tensor:
    """So many uint8 values on the host, which nobody has touched yet."""
    mapped = mmap.mmap(-1, max(1, num_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8)[:num_bytes]


def lock(memory: torch.Tensor) -> int:
    """Lock it for copies to and from a GPU for as long as it is there; returns CUDA's error, 0 for none."""
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if not code:
        # At exit the process's memory is let go of as a whole, and CUDA may be gone by then.
        weakref.finalize(memory.untyped_storage(), _unlock, memory.data_ptr()).atexit = False
    return code


def _unlock(start: int) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(start))
