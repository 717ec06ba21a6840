"""What ends a run from a worker's side, with words for the user."""


class Stop(RuntimeError):
    """A failure that trying again cannot mend, met by every worker at the same place; the message is the reason."""


class GuardError(RuntimeError):
    """The model on this worker does not compute, or does not hold, what it should; the message is the reason."""
