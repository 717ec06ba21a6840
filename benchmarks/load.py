"""How long a worker takes to have its base, what it holds at most meanwhile, and what of the files each worker reads.

    python -m benchmarks.load                            # 8B: 16-bit files, the same into the cache, the cache
    python -m benchmarks.load --workers 2 --cases files cache
    python -m benchmarks.load --shape tiny --device cpu --workers 2 --cases files writes cache   # that it works

Random weights are written once, and lie in the system's cache of files where that has room. Each case is a process for
each worker, on a GPU each, which calls what a worker calls (worker/base.py), once its libraries are there. Prints a
Markdown table: memory against the plan's forecast, and against what the worker holds in the end and a layer.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.bases import save_checkpoint
from benchmarks.shapes import SHAPES

GIB = 2**30
CACHED = {"files": False, "writes": True, "cache": True}  # model.cache_quantized


class Team:
    """The workers of this benchmark as seen by one of them."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def tell(self, message) -> None:
        """There is no driver."""
        print(message, file=sys.stderr)

    def gather(self, value) -> list:
        """Any value of each worker, by rank."""
        import torch

        gathered = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered


class Highest:
    """The most host memory of its own that this process has taken since it was begun, in GiB."""

    def __init__(self) -> None:
        self.before = self.most = own_gib()
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._is_done.wait(0.005):
            self.most = max(self.most, own_gib())

    def stop(self) -> float:
        """What was found."""
        self._is_done.set()
        self._thread.join()
        return max(self.most, own_gib()) - self.before


def own_gib() -> float:
    """Memory of this process that is not a file's."""
    status = Path("/proc/self/status").read_text()
    found = re.findall(r"RssAnon:\s+(\d+)", status) or re.findall(r"VmRSS:\s+(\d+)", status)
    return int(found[0]) / 2**20


def bytes_read() -> int:
    """That this process has asked files for so far."""
    found = re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    return int(found[0]) if found else 0


def measure(arguments, rank: int) -> dict:
    """Load as worker `rank` does."""
    import torch

    from qlora_ray.config import make_config
    from qlora_ray.data.stats import DataStats
    from qlora_ray.planning.early import exact_facts
    from qlora_ray.planning.plan import Hardware, make_plan
    from qlora_ray.storage import open_folder
    from qlora_ray.worker import base
    from qlora_ray.worker.messages import Run

    size, is_cuda = arguments.workers, arguments.device == "cuda"
    config = make_config({
        "model": {"base_model": arguments.base, "cache_quantized": CACHED[arguments.case]},
        "ray": {"num_workers": size}, "deepspeed": {"zero_stage": 3, "share_base": arguments.share_base},
    })  # fmt: skip
    rows = dict(num_rows=100, num_validation_rows=0, num_tokens=10_000, num_label_tokens=10_000, longest_row=100)
    hardware, facts = Hardware(size, size if is_cuda else 0), exact_facts(config)
    plan = make_plan(config, DataStats("key", 100, 0, 0, **rows), facts, hardware, None)
    folder = open_folder(str(Path(arguments.folder) / "load" / "run"))
    device = torch.device(f"cuda:{rank}" if is_cuda else "cpu")
    if is_cuda:
        torch.cuda.set_device(device)
        import bitsandbytes  # noqa: F401 - its kernels are there before the clock runs

        torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    torch.distributed.init_process_group(
        "nccl" if is_cuda else "gloo", init_method=f"file://{arguments.store}", rank=rank, world_size=size
    )
    team = Team(rank, size)
    team.gather(None)  # connects them
    read, highest, began = bytes_read(), Highest(), time.perf_counter()
    loaded = base.load(Run(config, plan, folder, folder, "", False), team, device)
    if is_cuda:
        torch.cuda.synchronize()
    seconds, on_host = time.perf_counter() - began, highest.stop()
    layer = max(1, facts.num_layers)
    told = {
        "case": arguments.case, "rank": rank, "seconds": seconds, "read_gib": (bytes_read() - read) / GIB,
        "host_gib": on_host, "is_share": loaded.is_share, "forecast_gib": plan.memory_forecast_gib["while_loading"],
        "forecast_held_gib": plan.memory_forecast_gib["base"],
        "layer_gib": facts.num_linear_parameters / layer * (2 if is_cuda else 4) / GIB,
    }  # fmt: skip
    if is_cuda:
        told |= {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "held_gib": torch.cuda.memory_allocated() / GIB}
    torch.distributed.destroy_process_group()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--cases", nargs="+", choices=CACHED, default=["files", "files", "writes", "cache", "cache"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--share-base", default="world", choices=["auto", "world", "replicate"])
    parser.add_argument("--folder", default="/tmp/throughput_checkpoints")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=120, help="seconds of each case")
    parser.add_argument("--out", default="runs/load.json")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "RANK", "STORE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.base = save_checkpoint(arguments.shape, arguments.folder, arguments.device, arguments.layers)
    if arguments.one:
        arguments.case, rank, arguments.store = arguments.one
        print("RESULT " + json.dumps(measure(arguments, int(rank))))
        return
    names = ["case", "worker", "seconds", "read GiB", "GPU peak GiB", "forecast", "held GiB", "forecast"]
    names += ["peak - held", "a layer, 16 bits", "host GiB"]
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    place, results = Path(arguments.folder) / "load", []
    shutil.rmtree(place, ignore_errors=True)
    (place / "run").mkdir(parents=True)
    for number, case in enumerate(arguments.cases):
        results += _in_processes(arguments, case, place / f"store{number}")
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))


def _in_processes(arguments, case: str, store: Path) -> list[dict]:
    """What the workers measured, which are shown."""
    command = [sys.executable, "-m", "benchmarks.load", *sys.argv[1:], "--one", case]
    ranks = range(arguments.workers)
    running = [
        subprocess.Popen(
            [*command, str(rank), str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.workers)},
        )
        for rank in ranks
    ]  # fmt: skip
    results, ends = [], time.monotonic() + arguments.limit
    for rank, process in zip(ranks, running, strict=True):
        try:
            said, faults = process.communicate(timeout=max(1.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, faults = process.communicate()
        found = [line for line in said.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"{case}, worker {rank}: ended with {process.returncode}\n{faults[-2500:]}", flush=True)
            continue
        results.append(json.loads(found[0].removeprefix("RESULT ")))
        _show(results[-1])
    return results


def _show(r: dict) -> None:
    peak, held = r.get("peak_gib", 0.0), r.get("held_gib", 0.0)
    errors = [f" ({r[name] / measured - 1:+.1%})" if measured else ""
              for name, measured in (("forecast_gib", peak), ("forecast_held_gib", held))]  # fmt: skip
    print(f"| {r['case']}{', its share' if r['is_share'] else ''} | {r['rank']} | {r['seconds']:.2f} | "
          f"{r['read_gib']:.2f} | {peak:.2f} | {r['forecast_gib']:.2f}{errors[0]} | {held:.2f} | "
          f"{r['forecast_held_gib']:.2f}{errors[1]} | {peak - held:.2f} | {r['layer_gib']:.2f} | {r['host_gib']:.2f} |",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
