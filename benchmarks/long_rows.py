"""Rows of many tokens on one GPU: tokens per second, share of the floor, memory of GPU and host against the forecast.

    python -m benchmarks.long_rows --lengths 65536 131072 262144 --layers 8 --whole 262144

Trains on one random row a step, through the product's engine under ZeRO stage 3, each length in a process of its own
that is ended after --limit seconds. --layers takes as many of the shape's, --whole all of them for one more length.
Prints a line of JSON for each, then a Markdown table.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.bases import build_base
from benchmarks.memory import facts_of, num_lora_parameters
from benchmarks.shapes import SHAPES, floor_tokens_per_second, shape_of
from qlora_ray.config import make_config
from qlora_ray.model import host
from qlora_ray.model.recompute import Keep, Room, choose
from qlora_ray.planning import deepspeed, memory

# Of a worker's process itself, Python, torch, CUDA and its libraries: 1.52 and 1.60 in two cases of benchmarks.offload
# on an H100. The plan leaves a tenth of the host's free memory for it (qlora_ray/model/host.py).
PROCESS_GIB = 1.55
ONCE_FROM = 4_000_000  # tokens x layers; such a step takes minutes, and is not run a second time to warm up


def measure(name: str, num_layers: int | None, length: int, keep_level: str, most_on_host: float | None) -> dict:
    """Train two steps, or one where it is long, and time the last. At most so many GiB lie on the host."""
    import torch

    from qlora_ray.model.adapter import add_adapter, trainable
    from qlora_ray.model.fused import fuse, keep
    from qlora_ray.worker.engine import Engine
    from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

    shape, began = shape_of(name, num_layers), time.perf_counter()
    config = make_config({"training": {"batch_size": 1, "max_length": length}})
    facts = replace(facts_of(shape), context_length=length)
    known = memory.sizes(config, facts, num_lora_parameters(facts, config.model.lora_r), 3, "bfloat16")
    model = add_adapter(build_base(shape, "cuda"), config.model, torch.bfloat16, 0)
    fuse(model)
    settings = deepspeed.defaults(config, 3, 1, "bfloat16", sum(p.numel() for p in trainable(model).values()))
    engine = Engine(model, config.training, settings)
    engine.train()
    free, _ = torch.cuda.mem_get_info()
    left = free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    on_host = host.SHARE * host.available_bytes()
    room = Room(0.9 * left, min(on_host, most_on_host * 2**30) if most_on_host else on_host)
    choice = choose(known.layer, facts.num_layers, length, facts.vocab_size, room)
    if keep_level != "auto":
        choice = memory.all_layers(known, Keep[keep_level.upper()])
    keep(model, choice)
    print(f"{time.perf_counter() - began:.0f} s: built, {choice}, {room}", file=sys.stderr, flush=True)
    ids = torch.randint(3, shape["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0)).cuda()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 if length * facts.num_layers > ONCE_FROM else 2):
        torch.cuda.synchronize()
        start, batch = time.perf_counter(), {"input_ids": ids, "labels": ids}
        nats = sum_of_nats(engine, batch)
        print(f"{time.perf_counter() - began:.0f} s: {float(nats) / length:.4f} nats", file=sys.stderr, flush=True)
        engine.backward(nats / num_label_tokens(batch))
        engine.add_up(1)
        is_finite = engine.step(1e-4)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    predicted = memory.peak_gib(memory.memory_gib(known, length, choice))
    peak, parked = torch.cuda.max_memory_allocated() / 2**30, memory.host_gib(known, length, choice)
    return {
        "layers": facts.num_layers, "length": length, "kept": str(choice), "step_seconds": seconds,
        "tokens_per_second": length / seconds[-1],
        "floor_share": length / seconds[-1] / floor_tokens_per_second(shape, length),
        "peak_gib": peak, "forecast_gib": predicted, "error": predicted / peak - 1,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "host_gib": resident_gib(), "host_forecast_gib": parked + PROCESS_GIB, "loss": float(nats) / length,
        "is_finite": is_finite, "seconds": time.perf_counter() - began, "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def resident_gib() -> float:
    """What this process holds now and nothing can take from it: without the pages of files, libraries among them."""
    status = Path("/proc/self/status").read_text()
    return sum(int(kib) for kib in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 131072, 262144])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--whole", type=int, help="one more length, with all layers")
    parser.add_argument("--keep", default="auto", choices=["auto", "attention", "parked", "input", "host"])
    parser.add_argument("--host-gib", type=float, help="at most, to park in; else what the host has")
    parser.add_argument("--limit", type=int, default=280, help="seconds for each length")
    parser.add_argument("--out", default="runs/long_rows.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        _measure_alone(arguments)
        return
    cases = [(length, arguments.layers) for length in arguments.lengths]
    cases += [(arguments.whole, None)] if arguments.whole else []
    results = []
    for length, layers in cases:
        made = _in_a_process(arguments, length, layers)
        results += [made] if made else []
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))
    print("| layers | tokens | tokens/s | of the floor | GPU GiB | forecast | host GiB | forecast | kept |")
    print("|---" * 9 + "|")
    for r in results:
        print(
            f"| {r['layers']} | {r['length']:,} | {r['tokens_per_second']:,.0f} | {r['floor_share']:.1%} | "
            f"{r['peak_gib']:.2f} | {r['forecast_gib']:.2f} ({r['error']:+.1%}) | {r['host_gib']:.2f} | "
            f"{r['host_forecast_gib']:.2f} | {r['kept']} |"
        )


def _in_a_process(arguments: argparse.Namespace, length: int, layers: int | None) -> dict | None:
    """What one length measured, or None with a line that says why not."""
    command = [sys.executable, "-m", "benchmarks.long_rows", "--one", "--shape", arguments.shape, "--lengths"]
    command += [str(length), "--keep", arguments.keep, *(["--layers", str(layers)] if layers else [])]
    command += ["--host-gib", str(arguments.host_gib)] if arguments.host_gib else []
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired as error:
        said = bytes(error.stderr or b"").decode(errors="replace")[-1500:]
        print(f"{length} tokens, {layers or 'all'} layers: not done in {arguments.limit} s\n{said}", flush=True)
        return None
    found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"{length} tokens, {layers or 'all'} layers: failed\n{ran.stderr[-2500:]}", flush=True)
        return None
    print(found[0].removeprefix("RESULT "), flush=True)
    return json.loads(found[0].removeprefix("RESULT "))


def _measure_alone(arguments: argparse.Namespace) -> None:
    import torch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group("nccl")
    made = measure(arguments.shape, arguments.layers, arguments.lengths[0], arguments.keep, arguments.host_gib)
    print("RESULT " + json.dumps(made))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
