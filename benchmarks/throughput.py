"""Tokens per second and peak memory of one training step, ours and peers', side by side on one GPU.

    python -m benchmarks.throughput --shapes llama-8b qwen2.5-7b --variants ours ours_stage3 peft_liger unsloth

Each variant runs in a process of its own on the same random weights, data and LoRA start: NF4 with double quantization,
r=16 on all projections but those of experts, no dropout, AdamW. Mixtures of experts, for example:

    python -m benchmarks.throughput --shapes qwen3-30b-a3b --length 4096 --variants ours:input ours_experts:input

Unsloth runs where it is installed. Writes JSON and a Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.bases import checkpoint_of, save_checkpoint
from benchmarks.shapes import SEED, SHAPES, floor_tokens_per_second, shape_of
from benchmarks.variants import ours, peft, unsloth


def measure(arguments) -> dict:
    """Build one variant and time its steps."""
    began = time.perf_counter()
    if arguments.variant.startswith("unsloth"):
        import unsloth as _  # noqa: F401 - patches transformers, so it comes first
    import torch

    shape = shape_of(arguments.shape, arguments.layers)
    make = {"ours": ours, "peft": peft, "unsloth": unsloth}[arguments.variant.split("_")[0]]
    step, share = make(arguments, shape)
    cuda = arguments.device == "cuda"
    load_seconds = time.perf_counter() - began
    while arguments.go and not Path(arguments.go).exists():
        time.sleep(0.2)
    generator = torch.Generator().manual_seed(SEED)
    size = (arguments.batch_size, arguments.length)
    batches = [torch.randint(3, shape["vocab_size"], size, generator=generator) for _ in range(4)]
    losses, seconds, host, began = [], [], Host(), time.perf_counter()
    for number in range(arguments.warmup + arguments.steps):
        ids = batches[number % len(batches)].to(arguments.device)
        host.start()
        losses.append(step({"input_ids": ids, "labels": ids}, host.lap).detach())
        if number == 0:
            first_step_seconds = float(losses[0]) * 0 + time.perf_counter() - began
        if number >= arguments.warmup - 1:
            seconds.append(_mark(cuda))
    if cuda:
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1000 for a, b in zip(seconds, seconds[1:], strict=False)]
    else:
        seconds = [b - a for a, b in zip(seconds, seconds[1:], strict=False)]
    if arguments.profile:
        _profile(step, {"input_ids": ids, "labels": ids}, host, arguments.profile)
    tokens = arguments.batch_size * arguments.length
    median = statistics.median(seconds)
    return {
        "shape": f"{arguments.shape}, {shape['num_hidden_layers']} layers",
        "variant": arguments.variant, "keep": ",".join(arguments.keep), "rows": size[0],
        "length": size[1], "tokens_per_second": tokens / median, "spread": (max(seconds) - min(seconds)) / median,
        "floor_share": tokens / median / floor_tokens_per_second(shape, arguments.length),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
        "four_bit_share": share, "loss_first": float(losses[0]), "loss_last": float(losses[-1]),
        "load_seconds": load_seconds,
        "first_step_seconds": first_step_seconds, "host_seconds": host.medians(),
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
    }  # fmt: skip


class Host:
    """Seconds the host spends in each phase of a step: what it needs to launch it, and where it waits."""

    def __init__(self) -> None:
        self.laps: dict[str, list[float]] = {}

    def start(self) -> None:
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps.setdefault(name, []).append(now - self._began)
        self._began = now

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(values), 4) for name, values in self.laps.items()}


def _mark(cuda: bool):
    import torch

    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _profile(step, batch, host: Host, path: str) -> None:
    import cProfile
    import io
    import pstats

    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step(batch, host.lap)
        torch.cuda.synchronize()
    calls = cProfile.Profile()
    calls.enable()
    for _ in range(3):
        step(batch, host.lap)
    calls.disable()
    text = io.StringIO()
    pstats.Stats(calls, stream=text).sort_stats("tottime").print_stats(60)
    pstats.Stats(calls, stream=text).sort_stats("cumtime").print_stats(80)
    table = trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    Path(path).write_text(f"{table}\n{text.getvalue()}")


def table(results: list[dict]) -> str:
    """Markdown."""
    lines = ["| shape | variant | keeps | tokens/s | of the floor | peak GiB | loss first -> last |", "|" + "---|" * 7]
    for r in results:
        peak = f"{r['peak_gib']:.2f}" if r["peak_gib"] else "-"
        lines.append(
            f"| {r['shape']} | {r['variant']} | {r['keep']} | {r['tokens_per_second']:,.0f} | {r['floor_share']:.1%} | "
            f"{peak} | {r['loss_first']:.4f} -> {r['loss_last']:.4f} |"
        )
    return "\n".join(lines)


def _start(arguments, shape: str, variant: str, go: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.throughput", "--one", "--shapes", shape, "--variants", variant]
    command += ["--go", go]
    for name in ("batch_size", "length", "steps", "warmup", "device", "checkpoints"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    if arguments.layers:
        command += ["--layers", str(arguments.layers)]
    if arguments.profile and variant == arguments.variants[-1]:
        command += ["--profile", arguments.profile]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # what it says of errors is seen at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-8b"], choices=SHAPES)
    default = ["ours:all", "ours:host", "ours_stage3:all", "peft_liger:all"]
    parser.add_argument(
        "--variants",
        nargs="+",
        default=default,
        help="name:keep, e.g. ours:all, ours_stage3:host, ours_dora_stage3:all",
    )
    parser.add_argument("--layers", type=int, help="as many layers of each shape, where a whole one takes too long")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checkpoints", default="/tmp/throughput_checkpoints", help="where Unsloth's input is written")
    parser.add_argument("--out", default="runs/throughput.json")
    parser.add_argument("--profile", help="write the last variant's kernel table here")
    parser.add_argument("--together", action="store_true", help="load all at once, then time one after the other")
    parser.add_argument("--go", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        arguments.shape = arguments.shapes[0]
        arguments.variant, keep = arguments.variants[0].split(":")
        arguments.keep = keep.split(",")
        if arguments.variant.startswith("unsloth"):
            arguments.checkpoint = str(checkpoint_of(arguments.shape, arguments.layers, arguments.checkpoints))
        print("RESULT " + json.dumps(measure(arguments)))
        return
    results, folder = [], tempfile.mkdtemp()
    cases = [(shape, variant) for shape in arguments.shapes for variant in arguments.variants]
    if any(variant.startswith("unsloth") for variant in arguments.variants):
        for shape in arguments.shapes:
            save_checkpoint(shape, arguments.checkpoints, arguments.device, arguments.layers)
    running = {}
    for number, case in enumerate(cases):
        for other, one in enumerate(cases[number:], number):
            if one not in running and (arguments.together or other == number):
                running[one] = _start(arguments, *one, go=f"{folder}/{other}")
        Path(folder, str(number)).touch()
        out, _ = running[case].communicate()
        found = [line for line in out.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"{' '.join(case)}: ended with {running[case].returncode} and no result\n{out[-3000:]}", flush=True)
            continue
        results.append(json.loads(found[0].removeprefix("RESULT ")))
        r = results[-1]
        print(
            f"{' '.join(case)}: {r['tokens_per_second']:,.0f} tokens/s, {r['peak_gib'] or 0:.2f} GiB, loss "
            f"{r['loss_last']:.4f}, {r['four_bit_share']:.0%} of the weights in 4 bits, host {r['host_seconds']}",
            flush=True,
        )
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))
    print(table(results))
    if len(results) < len(cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
