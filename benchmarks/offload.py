"""What it costs to train a base that does not fit the card: weights that pass from the host or a disk against none.

    python -m benchmarks.offload                     # Llama-3.3-70B shape, 16k tokens a micro-batch, a card of 24 GiB
    python -m benchmarks.offload --layers 8 --cases whole disk --disk /local_nvme
    python -m benchmarks.offload --layers 5 --device cpu --tiny --cases whole host disk   # that the command works

Each case is a process of its own with a time limit: the whole base on the uncapped GPU; in host memory with the process
capped to `--cap` GiB; on a disk, capped, where what was read is dropped from memory at once, so that the disk gives it
each time. All keep the same for backward: layer inputs in host memory. Every layer has the same random bytes, which are
made once. Prints what it does, a table with the forecast of memory beside what was measured, and JSON to --out.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.long_rows import PROCESS_GIB, resident_gib
from benchmarks.shapes import SHAPES

SEED, RANK, LEARNING_RATE = 0, 16, 2e-4
TIMED_SLABS = 8
BEGAN = time.perf_counter()


def say(text: str) -> None:
    """A line of progress, with the seconds since the process began."""
    print(f"{time.perf_counter() - BEGAN:6.1f} s  {text}", flush=True)


def shape_of(arguments) -> dict:
    """The base's config, with as many layers as are asked for."""
    return {**SHAPES["tiny" if arguments.tiny else "llama-70b"], "num_hidden_layers": arguments.layers}


def build(arguments, away):
    """A model of random weights in 4 bits: on the device where `away` is None, else put away by it."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_ray.model.shares import FourBit, num_packed, state_of

    torch.manual_seed(SEED)
    device, dtype = torch.device(arguments.device), torch.bfloat16
    config = AutoConfig.for_model(
        max_position_embeddings=32768, tie_word_embeddings=False, pad_token_id=0, **shape_of(arguments)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers, model.model.layers = model.model.layers, torch.nn.ModuleList()
    model.to_empty(device=device).apply(model._init_weights)
    how, drawn = FourBit("nf4", True, 64), {}
    for layer in layers:
        linears = [(name, one) for name, one in layer.named_modules() if type(one) is torch.nn.Linear]
        for name, linear in linears:
            size = linear.weight.numel()
            if name not in drawn:
                values = torch.randint(256, (num_packed(size), 1), dtype=torch.uint8, device=device)
                drawn[name] = values, torch.rand(size // how.block, device=device).mul_(0.02).add_(0.01)
            values, scales = drawn[name]
            state = state_of(scales.clone(), linear.weight.shape, dtype, how)
            with torch.device("meta"):
                made = Linear4bit(linear.in_features, linear.out_features, False, dtype, quant_type="nf4")
            made.quant_state, made.support_avx512bf16_for_cpu = state, False
            made.weight = Params4bit(
                values if away else values.clone(), quant_state=state, blocksize=64, compress_statistics=True,
                quant_type="nf4", module=made, bnb_quantized=True,
            )  # fmt: skip
            if away:
                away.keep(made.weight, values)
            layer.set_submodule(name, made)
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, name).to_empty(device=device).weight.data.fill_(1)
    model.model.layers = layers
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.requires_grad_(False)
    model.is_loaded_in_4bit, model.config.use_cache = True, False
    return model


def away_of(arguments):
    """Where the weights of the case are put; None where they stay."""
    from qlora_ray.model.homes import Away, DiskFile

    class Once(Away):
        """Values that several layers have are brought to the host once, not to a disk."""

        def __init__(self, file=None):
            super().__init__(file)
            self._known = {}  # by the address on the GPU

        def put(self, values):
            if self.is_on_disk or not values.is_cuda:
                return super().put(values)
            if values.data_ptr() not in self._known:
                self._known[values.data_ptr()] = super().put(values)
            return self._known[values.data_ptr()]

    class Cold(DiskFile):
        """Has the system forget what was read."""

        def read_into(self, out, start):
            super().read_into(out, start)
            self.forget(start, out.numel())

    if arguments.case == "whole":
        return None
    if arguments.case == "host":
        return Once()
    return Once(Cold(arguments.disk, int(arguments.layers * (5e6 if arguments.tiny else 0.47e9))))


def forecast(arguments, num_trainable: int):
    """What the plan says of the case: GiB of the GPU by part, and of the host."""
    from benchmarks.memory import facts_of
    from qlora_ray.config import make_config
    from qlora_ray.model.recompute import Keep
    from qlora_ray.planning import memory, offload

    settings = {"whole": {}, "host": {"offload_params": "cpu"}, "disk": {"offload_params": "nvme", "nvme_path": "/tmp"}}
    config = make_config({
        "training": {"batch_size": arguments.rows, "max_length": arguments.length}, "model": {"lora_r": RANK},
        "deepspeed": {"zero_stage": 3, **settings[arguments.case]},
    })  # fmt: skip
    known = memory.sizes(config, facts_of(shape_of(arguments)), num_trainable, 3, "bfloat16")
    tokens, leanest = arguments.rows * arguments.length, memory.all_layers(known, Keep.HOST)
    passing = offload.passing(known, tokens, arguments.length, None, "H100")
    on_host = memory.host_gib(known, tokens, leanest) + (passing.host_bytes / 2**30 if passing else 0)
    return memory.memory_gib(known, tokens, leanest), on_host


def measure(arguments) -> dict:
    """One case: seconds a step, peak memory, and how fast weights come."""
    import torch

    from qlora_ray.config import Config
    from qlora_ray.model.adapter import add_adapter, trainable
    from qlora_ray.model.fused import fuse, fused_layers, keep
    from qlora_ray.model.recompute import Choice, Keep
    from qlora_ray.model.ring import NUM_SLOTS, make_ring
    from qlora_ray.planning import deepspeed, memory
    from qlora_ray.worker.engine import Engine

    is_cuda, device = arguments.device == "cuda", torch.device(arguments.device)
    if is_cuda and arguments.case != "whole":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.cap * 2**30 / total))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29531 + os.getpid() % 1000), RANK="0", WORLD_SIZE="1",
                      LOCAL_RANK="0")  # fmt: skip
    torch.distributed.init_process_group("nccl" if is_cuda else "gloo")
    torch.zeros(1, device=device)
    away = away_of(arguments)
    say("imported; making the base")
    config = Config.model_validate({"model": {"lora_r": RANK, "lora_alpha": RANK}})
    model = add_adapter(build(arguments, away), config.model, torch.bfloat16, SEED)
    say(f"made; {fuse(model)}")
    ring = make_ring(model, away, device) if away else None
    if away:
        away._known.clear()  # the slabs have copies, and only this benchmark's first layer would stay beside them
    if arguments.case == "disk":
        away._file.forget()
    say(f"{len(ring.slabs)} slabs of {ring.slabs[0].num_bytes / 1e6:,.0f} MB are there" if ring else "all stays")
    keep(model, Choice((Keep.HOST,) * len(fused_layers(model))))
    num_trainable = sum(parameter.numel() for parameter in trainable(model).values())
    settings = deepspeed.defaults(config, 3, 1, "bfloat16", num_trainable)
    engine = Engine(model, config.training, {**settings, "train_micro_batch_size_per_gpu": arguments.rows})
    engine.train()
    planned, on_host = forecast(arguments, num_trainable)
    told = {"case": arguments.case, "layers": arguments.layers, "load_seconds": time.perf_counter() - BEGAN}
    if ring:
        ring.keep_last(min(arguments.resident, len(ring.slabs)))
        told |= {"gb_per_second": _bandwidth(ring, device), "resident": ring.num_resident}
        told["moved_gb"] = 2 * max(0, ring.num_passing - NUM_SLOTS) * ring.slabs[0].num_bytes / 1e9  # each step
        say(f"{told['gb_per_second']:.1f} GB/s with nothing else to do")
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    told |= _train(arguments, engine, device)
    told |= {"host_gib": resident_gib(), "host_forecast_gib": on_host + PROCESS_GIB}
    told["forecast_gib"] = memory.peak_gib(planned)
    if is_cuda:
        told |= {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "device": torch.cuda.get_device_name(0),
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
            "retries": torch.cuda.memory_stats()["num_alloc_retries"],
        }  # fmt: skip
    torch.distributed.destroy_process_group()
    return told


def _train(arguments, engine, device) -> dict:
    """Seconds of each step after the first ones, and losses."""
    import torch

    from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

    generator, vocab = torch.Generator().manual_seed(SEED), shape_of(arguments)["vocab_size"]
    seconds, losses = [], []
    for number in range(arguments.warmup + arguments.steps):
        ids = torch.randint(3, vocab, (arguments.rows, arguments.length), generator=generator).to(device)
        batch = {"input_ids": ids, "labels": ids}
        _wait(device)
        at = time.perf_counter()
        loss = sum_of_nats(engine, batch) / num_label_tokens(batch)
        _wait(device)
        forward = time.perf_counter() - at
        engine.backward(loss)
        engine.add_up(1)
        engine.step(LEARNING_RATE)
        _wait(device)
        seconds.append(time.perf_counter() - at)
        losses.append(float(loss.detach()))
        del loss  # with its graph, as the product does before the next forward pass
        say(f"step {number}: {seconds[-1]:.2f} s, {forward:.2f} of them forward, loss {losses[-1]:.6f}")
    best = min(seconds[arguments.warmup :])
    return {"seconds": best, "tokens_per_second": arguments.rows * arguments.length / best, "losses": losses}


def _bandwidth(ring, device) -> float:
    """GB/s of some slabs, one after the other, with nothing else to do."""
    slabs = ring.slabs[: min(TIMED_SLABS, ring.num_passing)]
    ring.fetch(len(slabs) - 1, 0)  # the first copy of all, and not what is asked for next
    _wait(device)
    at = time.perf_counter()
    for number in range(len(slabs)):
        ring.fetch(number, 0)
    _wait(device)
    return sum(slab.num_bytes for slab in slabs) / (time.perf_counter() - at) / 1e9


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["whole", "host", "disk"], default=["whole", "host"])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--cap", type=float, default=24, help="GiB that a process with weights away may take")
    parser.add_argument("--resident", type=int, default=0, help="last layers that stay on the GPU")
    parser.add_argument("--disk", default="/tmp", help="a folder on a local disk")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit", type=float, default=150, help="seconds of each case")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", default="runs/offload.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print("RESULT " + json.dumps(measure(arguments)))
        return
    results = [found for case in arguments.cases if (found := _in_a_process(case, arguments.limit))]
    _show(results)
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))


def _in_a_process(case: str, limit: float) -> dict | None:
    """What a case measured, or None with a line that says why not; what it says on the way is passed on."""
    command, found = [sys.executable, "-m", "benchmarks.offload", *sys.argv[1:], "--case", case], None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(limit, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith("RESULT "):
                found = json.loads(line.removeprefix("RESULT "))
            else:
                print(f"{case:6}{line}", end="", flush=True)
        timer.cancel()
    if found is None:
        print(f"{case}: ended with {process.returncode}, after {limit:g} s at most", flush=True)
    return found


def _show(results: list[dict]) -> None:
    whole = next((r["seconds"] for r in results if r["case"] == "whole"), None)
    names = ["case", "layers", "s a step", "tokens/s", "of whole", "of what the bandwidth allows", "GB/s alone"]
    names += ["GPU GiB", "forecast", "reserved", "retries", "host GiB", "forecast", "resident", "begun s", "losses"]
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    for r in results:
        share = f"{whole / r['seconds']:.3f}" if whole else "-"
        allowed = "-"
        if whole and "moved_gb" in r:
            allowed = f"{max(whole, r['moved_gb'] / r['gb_per_second']) / r['seconds']:.3f}"
        peak = r.get("peak_gib", 0)
        error = f" ({r['forecast_gib'] / peak - 1:+.1%})" if peak else ""
        on_host = f"{r['host_forecast_gib']:.2f} ({r['host_forecast_gib'] / max(r['host_gib'], 1e-3) - 1:+.1%})"
        print(f"| {r['case']} | {r['layers']} | {r['seconds']:.2f} | {r['tokens_per_second']:,.0f} | {share} | "
              f"{allowed} | {r.get('gb_per_second', 0):.1f} | {peak:.2f} | {r['forecast_gib']:.2f}{error} | "
              f"{r.get('reserved_gib', 0):.1f} | {r.get('retries', 0)} | {r['host_gib']:.2f} | {on_host} | "
              f"{r.get('resident', '-')} | {r['load_seconds']:.0f} | "
              f"{' '.join(f'{loss:.6f}' for loss in r['losses'])} |")  # fmt: skip


if __name__ == "__main__":
    main()
