"""Seconds from start until generate's first word: python -m benchmarks.answer ADAPTER [repetitions].

Whole processes, caches warm, on whatever else the machine is doing: run it on an idle one.
"""

import statistics
import subprocess
import sys
import time

PROMPT = "Turn the sentence into JSON.\n\nIvan is a gardener from Dublin, aged 38."


def seconds_to_first_word(adapter: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "qlora_ray.generate", "--adapter", adapter, "--prompt", PROMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.read(1), "no answer"
        return time.perf_counter() - began


def main() -> None:
    adapter, repetitions = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    seconds = [seconds_to_first_word(adapter) for _ in range(repetitions + 1)][1:]  # the first fills the page cache
    print(
        f"first word after {statistics.median(seconds):.2f} s (median; all: {', '.join(f'{s:.2f}' for s in seconds)})"
    )


if __name__ == "__main__":
    main()
