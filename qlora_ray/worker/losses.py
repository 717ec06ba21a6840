"""transformers' losses, loaded without what only the losses of images take.

Stands on one function that they ask: BOXES.
"""

from qlora_ray.libraries import Patch

BOXES = Patch(
    "transformers", "5.23.0", "transformers.utils.is_scipy_available says no while the losses are loaded",
    gains="half a second of each worker's start: scipy.optimize, which assigns boxes to each other",
    delete_when="transformers imports scipy where it is called",
)  # fmt: skip


def load() -> None:
    """Call it before transformers' models are imported."""
    from transformers import utils

    def says_no() -> bool:
        return False

    asked, utils.is_scipy_available = utils.is_scipy_available, says_no
    try:
        import transformers.loss.loss_utils  # noqa: F401
    finally:
        utils.is_scipy_available = asked
