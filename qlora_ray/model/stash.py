"""Layer inputs parked in pinned host memory between forward and backward, copied while the GPU computes."""

import torch

from qlora_ray.model.pinned import host_memory, lock

LEAVING = 2  # tensors that may be on their way to the host while the GPU goes on


class HostStash:
    """One slot a layer. Backward takes the slots in the reverse order; each take starts the copy of the one before."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._slots: dict[int, torch.Tensor] = {}
        self._shapes: dict[int, torch.Size] = {}
        self._parked: dict[int, torch.cuda.Event] = {}
        self._coming: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._leaving: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def put(self, slot: int, x: torch.Tensor) -> None:
        """Copy x (on the GPU) to the host, behind what the current stream has been given so far."""
        assert slot not in self._parked, "a layer's input was parked twice without a backward pass between"
        held = self._slots.get(slot)
        if held is None or held.numel() < x.numel() or held.dtype != x.dtype:
            if held is not None:
                self._stream.synchronize()  # of copies into what is let go of
            held = self._slots[slot] = _pinned(x.numel(), x.dtype)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            held[: x.numel()].view(x.shape).copy_(x, non_blocking=True)
        self._shapes[slot], self._parked[slot] = x.shape, self._stream.record_event()
        self._leaving.append((x, self._parked[slot]))
        self.let_go(all_but=LEAVING)

    def take(self, slot: int) -> torch.Tensor:
        """The parked tensor, on the GPU again."""
        self.let_go()
        self._fetch(slot)
        x, arrived = self._coming.pop(slot)
        torch.cuda.current_stream(x.device).wait_event(arrived)
        earlier = [other for other in self._parked if other < slot]
        if earlier:
            self._fetch(max(earlier))
        return x

    def let_go(self, all_but: int = 0) -> None:
        """Let go of what was put first, once the current stream waits for its copy: its memory is free at once.

        After record_stream it stays taken until the host finds the copy done, and the host may be a whole forward pass
        ahead of the GPU: no input had left it when backward's peak was allocated.
        """
        while len(self._leaving) > all_but:
            x, copied = self._leaving.pop(0)
            torch.cuda.current_stream(x.device).wait_event(copied)

    def _fetch(self, slot: int) -> None:
        if slot in self._coming:
            return
        parked, shape = self._parked.pop(slot), self._shapes.pop(slot)
        held = self._slots[slot]
        x = torch.empty(shape, dtype=held.dtype, device=self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # for the memory of x
        self._stream.wait_event(parked)
        with torch.cuda.stream(self._stream):
            x.copy_(held[: x.numel()].view(shape), non_blocking=True)
        self._coming[slot] = x, self._stream.record_event()


def _pinned(numel: int, dtype: torch.dtype) -> torch.Tensor:
    held = host_memory(numel * dtype.itemsize)
    torch.cuda.check_error(lock(held))
    return held.view(dtype)
