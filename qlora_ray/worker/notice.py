"""Notices that a node of this worker group will be taken away: spot capacity, maintenance, `ray drain-node`.

Reads Ray Train's own record of it: PREEMPTION.
"""

import time
from collections.abc import Callable

from qlora_ray.libraries import Patch

# Ray Train waits so long for a node whose drain has no deadline (ray/train/v2/_internal/constants.py).
SECONDS_WITHOUT_DEADLINE = 120.0
MARGIN_SECONDS = 2.0
AFTER_DEADLINE_SECONDS = 30.0  # if the group still lives then, the node has stayed

PREEMPTION = Patch(
    "ray", "2.60.0", "reads preemption_context.preemption_info of a worker's TrainContext",
    gains="what ray.train.get_preemption_info() returns, without its barrier over all workers at every step",
    delete_when="ray.train.get_preemption_info() can be asked on one worker",
)  # fmt: skip


class Notice:
    """Saves at once when a notice comes, and again, to wait for the end, shortly before the node is taken."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._deadline: float | None = None  # time.time()
        self._has_held = False

    def look(self, seconds_to_save: float) -> tuple[bool, float]:
        """(whether to save now, until when to hold after saving or 0), given what a step and a save take together."""
        info = _preemption_info()
        if info is None or self._has_held:
            return False, 0.0
        is_new = self._deadline is None
        if self._deadline is None:
            wait = SECONDS_WITHOUT_DEADLINE
            self._deadline = info.deadline_ms / 1000 if info.deadline_ms else time.time() + wait
            left = max(0.0, self._deadline - time.time())
            ranks = ", ".join(map(str, info.preempted_ranks))
            self._tell(f"the node of worker {ranks} will be taken away in {left:.0f} s")
        self._has_held = self._deadline - time.time() < 2 * seconds_to_save + MARGIN_SECONDS
        return is_new, self._deadline + AFTER_DEADLINE_SECONDS if self._has_held else 0.0


def _preemption_info():
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info
