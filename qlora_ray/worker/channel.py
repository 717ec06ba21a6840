"""What driver and workers tell each other while a run goes on: progress one way, a request to stop the other."""

import ray


@ray.remote(num_cpus=0)
class Channel:
    """Holds messages until the driver takes them."""

    def __init__(self) -> None:
        self._messages: list[dict] = []
        self._stop = False

    def tell(self, message: dict) -> bool:
        """Keep a message for the driver; answers whether the run shall stop."""
        self._messages.append(message)
        return self._stop

    def take(self) -> list[dict]:
        """All messages since the last call, oldest first."""
        taken, self._messages = self._messages, []
        return taken

    def stop(self) -> None:
        """Ask the run to stop after its current step, leaving a checkpoint."""
        self._stop = True
