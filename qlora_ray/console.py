"""The terminal: one console for all doors, and what libraries say kept out of it."""

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def say_note(text: str) -> None:
    """Print a line marked as worth reading."""
    console.print(f"[yellow]note[/]  {escape(text)}")


@contextlib.contextmanager
def chatter_goes_to(path: str) -> Iterator[None]:
    """Send what libraries print to a file, while the console goes on speaking to the terminal."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "a", encoding="utf-8") as file:
        console.file = sys.stdout
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            console.file = None  # type: ignore[assignment]  # rich: sys.stdout again, whatever that is then


def quiet(debug: bool) -> None:
    """Keep what libraries say while loading out of the answers."""
    # bitsandbytes wraps helpers in torch.compile, which imports a compiler for a second; nothing here is compiled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Threads that spin while they wait make a busy machine's small products five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if debug:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    else:
        import logging

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces optional kernels
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore",
                 "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        for name, value in quiet.items():
            os.environ.setdefault(name, value)
        import warnings

        warnings.simplefilter("ignore")
