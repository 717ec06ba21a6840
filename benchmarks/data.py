"""The data plane's figures, each beside what it is compared with. One JSON object on stdout.

    python -m benchmarks.data tokenize [--records N]   against datasets.map + TRL's packing (pip install -e .[bench])
    python -m benchmarks.data tools [--records N]      the same, of records with tools, calls and results
    python -m benchmarks.data memory [--records N]     peak memory with so many records, and with ten times as many
    python -m benchmarks.data packing                  how full rows are, on long-tailed lengths
    python -m benchmarks.data delivery                 waiting for data at 100 ms steps, two workers

Records: seeded chats of one to three questions and answers, lengths log-normal, JSON Lines; the embedded base's
tokenizer; max_length 1024; loss on the answers only. Times are whole processes, imports included.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MAX_LENGTH = 1024
FIGURES = ("tokenize", "tools", "memory", "packing", "delivery")
TOOLS_TEMPLATE = "benchmarks/tools.jinja"  # knows tools, and marks what is generated, as TRL wants it
STEP_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "ours", "trl"])
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--tools", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="keep records and caches here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.figure in ("ours", "trl"):
            made = {"ours": ours, "trl": trl}[arguments.figure](folder, arguments.records, arguments.tools)
        else:
            made = globals()[arguments.figure](folder, arguments.records)
        print(json.dumps(made, indent=1))


def tokenize(folder: Path, records: int) -> dict:
    """Rows a second of both, one after the other."""
    write_records(folder, records)
    figures = {name: measure(folder, records, name, watched=False) for name in ("ours", "trl")}
    ratio = figures["trl"]["seconds"] / figures["ours"]["seconds"]
    return {**figures, "ours_over_trl_records_per_second": round(ratio, 2)}


def tools(folder: Path, records: int) -> dict:
    """Rows a second of both on records with tools."""
    write_tool_records(folder, records)
    figures = {name: measure(folder, records, name, watched=False, tools=True) for name in ("ours", "trl")}
    ratio = figures["trl"]["seconds"] / figures["ours"]["seconds"]
    return {**figures, "ours_over_trl_records_per_second": round(ratio, 2)}


def memory(folder: Path, records: int) -> dict:
    """Peak memory of ours with `records` and with ten times as many."""
    figures = {}
    for name, count in (("1x", records), ("10x", 10 * records)):
        write_records(folder, count)
        figures[name] = measure(folder, count, "ours", watched=True)
    return figures


def packing(folder: Path, records: int) -> dict:
    """Share of the rows' room that tokens fill, by max_length; and the seconds that packing takes."""
    import numpy as np

    from qlora_ray.data.pack import pack

    figures = {}
    for max_length in (512, 1024, 2048, 8192):
        lengths = np.random.default_rng(0).lognormal(5.3, 1.0, records).astype(int).clip(8, max_length)
        began = time.perf_counter()
        offsets, _ = pack(lengths, max_length, seed=0)
        seconds = time.perf_counter() - began
        efficiency = float(lengths.sum() / ((len(offsets) - 1) * max_length))
        figures[max_length] = {"efficiency": round(efficiency, 4), "seconds": round(seconds, 3)}
    return figures


def delivery(folder: Path, records: int) -> dict:
    """What two workers wait for rows, at a micro-batch every 100 ms and 600 of them, from a warm cache."""
    import ray

    from qlora_ray.cluster import connect
    from qlora_ray.config import Config

    write_records(folder, 20_000)
    ours(folder, 20_000)
    config = Config.model_validate({"ray": {"num_workers": 2}})
    connect.set_environment(config, debug=False)
    connect.start_ray(config, debug=False)
    worker = ray.remote(num_cpus=1)(wait_for_rows)
    return dict(enumerate(ray.get([worker.remote(str(folder), rank, 600) for rank in range(2)])))


def wait_for_rows(folder: str, rank: int, steps: int) -> dict:
    """One worker, as the loop reads: seconds to the first rows, and what part of the later steps it waited."""
    began = time.perf_counter()
    import torch

    from qlora_ray.data import delivery as module
    from qlora_ray.data.order import Order
    from qlora_ray.data.rows import open_rows
    from qlora_ray.storage import open_folder
    from qlora_ray.worker.batches import to_tensors
    from qlora_ray.worker.micro_batches import Tables

    imported = time.perf_counter() - began
    entry = open_folder(str(Path(folder) / "storage")) / "cache" / json.loads((Path(folder) / "entry.json").read_text())
    began = time.perf_counter()
    order = Order(len(open_rows(entry, "train")), seed=0, micro_batch_size=4, micro_batches_per_step=2)
    direct, num_direct = module.rows_at, 0

    def counted(*some):
        nonlocal num_direct
        num_direct += 1
        return direct(*some)

    module.rows_at = counted
    batches = Tables(module.Stream(entry, order, rank, 2, 0, steps))
    waits = []
    for step in range(steps):
        _, table = batches.next(step)
        waits.append(time.perf_counter() - began)
        to_tensors(table, 0, torch.device("cpu"))
        time.sleep(STEP_SECONDS)
        began = time.perf_counter()
    return {
        "import_seconds": round(imported, 2), "first_batch_seconds": round(waits[0], 3),
        "wait_share": round(sum(waits[1:]) / (len(waits) - 1) / STEP_SECONDS, 4),
        "longest_wait_seconds": round(max(waits[1:]), 3),
        "carried_by_ray_data": steps - num_direct, "micro_batches": steps,
    }  # fmt: skip


def ours(folder: Path, records: int, tools: bool = False) -> dict:
    """Tokenize, mask, pack and cache on all cores, as a run without a cluster does."""
    from qlora_ray.config import Config
    from qlora_ray.data.prepare import prepare
    from qlora_ray.data.spread import run_on_cores
    from qlora_ray.data.stats import Layout
    from qlora_ray.storage import open_folder

    config = Config.model_validate(
        {
            "training": {"max_length": MAX_LENGTH},
            "data": {
                "train_file": str(folder / f"{records}.jsonl"),
                "validation_split": 0,
                "chat_template": TOOLS_TEMPLATE if tools else None,
            },
        }
    )

    made = prepare(config, open_folder(str(folder / "storage")), how=Layout(packing=True), runner=lambda: run_on_cores)
    (folder / "entry.json").write_text(json.dumps(made.entry.name))
    return {"tokens": made.stats.num_tokens, "rows": made.stats.num_rows,
            "packing_efficiency": round(made.stats.packing_efficiency, 4)}  # fmt: skip


def trl(folder: Path, records: int, tools: bool = False) -> dict:
    """The same with what TRL's SFTTrainer does before it trains: its own code, a process for each core."""
    import datasets
    import pyarrow.compute
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from qlora_ray.config import base_model_path

    tokenizer = AutoTokenizer.from_pretrained(base_model_path("embedded"))
    if tools:
        tokenizer.chat_template = Path(TOOLS_TEMPLATE).read_text()
    settings = SFTConfig(
        str(folder), max_length=MAX_LENGTH, packing=True, assistant_only_loss=True,
        dataset_num_proc=len(os.sched_getaffinity(0)), report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    file, cache = str(folder / f"{records}.jsonl"), str(folder / "datasets")
    loaded = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache)
    trainer = type("Trainer", (), {"_tokenizer": tokenizer, "chat_template": None, "completion_only_loss": False})()
    made = SFTTrainer._prepare_dataset(trainer, loaded, tokenizer, settings, True, None, "train")
    tokens = pyarrow.compute.sum(pyarrow.compute.list_value_length(made.data["input_ids"])).as_py()
    return {"tokens": tokens, "rows": len(made), "packing_efficiency": round(tokens / len(made) / MAX_LENGTH, 4)}


def measure(folder: Path, records: int, who: str, watched: bool, tools: bool = False) -> dict:
    """Run `who` in a process of its own: wall seconds and records a second; watched also its peak memory."""
    command = [sys.executable, "-m", "benchmarks.data", who, "--records", str(records), "--folder", str(folder)]
    command += ["--tools"] if tools else []
    subprocess.run(["rm", "-rf", str(folder / "storage"), str(folder / "datasets")], check=True)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peaks: dict[str, float] = {}
    watch = threading.Thread(target=_watch, args=(process.pid, peaks))
    if watched:  # costs time
        watch.start()
    out, err = process.communicate()
    seconds = time.perf_counter() - began
    if watched:
        watch.join()
    if process.returncode:
        raise RuntimeError(err[-3000:])
    figures = json.loads(out[out.index("{") :])
    return {
        "seconds": round(seconds, 1), "records_per_second": round(records / seconds), **figures,
        **{f"peak_gib_{name}": round(value / 2**30, 2) for name, value in peaks.items()},
    }  # fmt: skip


def _watch(pid: int, peaks: dict[str, float]) -> None:
    """Memory that is the processes' own (USS), every half second: of the driver, of its largest child, of all."""
    import psutil

    process = psutil.Process(pid)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        sizes = []
        with contextlib.suppress(psutil.Error):  # one that ends meanwhile
            for one in [process, *process.children(recursive=True)]:
                sizes.append(one.memory_full_info().uss)
        if sizes:
            now = {"driver": sizes[0], "largest_child": max(sizes[1:], default=0), "all_together": sum(sizes)}
            peaks.update({name: max(value, peaks.get(name, 0)) for name, value in now.items()})
        time.sleep(0.5)


def write_records(folder: Path, count: int) -> None:
    """Seeded chats as JSON Lines; log-normal lengths."""
    import numpy as np

    path = folder / f"{count}.jsonl"
    if path.exists():
        return
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(random.choice(letters, random.integers(2, 9))) for _ in range(5000)])
    rank = 1 / np.arange(1, len(words) + 1)
    with path.open("w") as file:
        for first in range(0, count, 10_000):
            some = min(10_000, count - first)
            turns = random.integers(1, 4, some)
            sizes = np.clip(random.lognormal(2.4, 0.9, (some, 6)).astype(int), 1, 400)
            total = int(sum(sizes[i, : 2 * t].sum() for i, t in enumerate(turns)))
            drawn = iter(random.choice(words, total, p=rank / rank.sum()).tolist())
            for i, number in enumerate(turns):
                messages = [
                    {"role": ("user", "assistant")[k % 2], "content": " ".join(next(drawn) for _ in range(sizes[i, k]))}
                    for k in range(2 * number)
                ]
                file.write(json.dumps({"messages": messages}) + "\n")


def write_tool_records(folder: Path, count: int) -> None:
    """Seeded conversations as JSON Lines: two to four of forty tools, a question, calls, results, an answer."""
    import random

    pick = random.Random(0)
    words = ["".join(pick.choices("etaoinshrdlu", k=pick.randint(2, 9))) for _ in range(2000)]

    def say(most: int) -> str:
        return " ".join(pick.choices(words, k=pick.randint(3, most)))

    known = [
        {"type": "function", "function": {"name": f"tool_{i}", "description": say(8), "parameters": {
            "type": "object", "properties": {"what": {"type": "string", "description": say(6)}}, "required": ["what"]}}}
        for i in range(40)
    ]  # fmt: skip
    with (folder / f"{count}.jsonl").open("w") as file:
        for _ in range(count):
            offered = pick.sample(known, pick.randint(2, 4))
            names = [tool["function"]["name"] for tool in offered[: pick.randint(1, 2)]]
            calls = [{"type": "function", "function": {"name": name, "arguments": {"what": say(6)}}} for name in names]
            turns = [
                {"role": "user", "content": say(25)},
                {"role": "assistant", "content": "", "tool_calls": calls},
                *({"role": "tool", "name": name, "content": say(15)} for name in names),
                {"role": "assistant", "content": say(25)},
            ]
            file.write(json.dumps({"messages": turns, "tools": offered}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
