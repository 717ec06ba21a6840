"""What it costs to train a base that does not fit the card: weights that pass from the host or a disk against none.

    python -m benchmarks.offload                     # Llama-3.3-70B shape, 16k tokens a micro-batch, a card of 24 GiB
    python -m benchmarks.offload --disk /local_nvme  # and the same with the base on a disk
    python -m benchmarks.offload --layers 2 --device cpu --tiny   # that the command works

Random weights are made straight in 4 bits, a layer at a time. Each case is a process of its own with a time limit: the
whole base on the uncapped GPU; in host memory with the process capped to `--cap` GiB; on a disk, capped. All keep the
same for backward: layer inputs in host memory. Prints a table, and JSON to --out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SHAPE = dict(model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
             num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0)  # fmt: skip
TINY = dict(model_type="llama", hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=2048)  # fmt: skip
SEED, RANK, LEARNING_RATE = 0, 16, 2e-4


def build(arguments, away):
    """A model of random weights in 4 bits: on the device where `away` is None, else put away by it."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_ray.model.shares import FourBit, num_packed, state_of

    torch.manual_seed(SEED)
    device, dtype = torch.device(arguments.device), torch.bfloat16
    shape = {**(TINY if arguments.tiny else SHAPE), "num_hidden_layers": arguments.layers}
    config = AutoConfig.for_model(max_position_embeddings=32768, tie_word_embeddings=False, pad_token_id=0, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layers, model.model.layers = model.model.layers, torch.nn.ModuleList()
    model.to_empty(device=device).apply(model._init_weights)
    how = FourBit("nf4", True, 64)
    for layer in layers:
        for parent in layer.modules():
            for name, linear in list(parent.named_children()):
                if type(linear) is not torch.nn.Linear:
                    continue
                size = linear.weight.numel()
                values = torch.randint(256, (num_packed(size), 1), dtype=torch.uint8, device=device)
                scales = torch.rand(size // how.block, device=device).mul_(0.02).add_(0.01)
                state = state_of(scales, linear.weight.shape, dtype, how)
                with torch.device("meta"):
                    made = Linear4bit(linear.in_features, linear.out_features, False, dtype, quant_type="nf4")
                made.quant_state, made.support_avx512bf16_for_cpu = state, False
                made.weight = Params4bit(values, quant_state=state, blocksize=64, compress_statistics=True,
                                         quant_type="nf4", module=made, bnb_quantized=True)  # fmt: skip
                if away:
                    away.keep(made.weight, values)
                setattr(parent, name, made)
        for parameter_name in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, parameter_name).to_empty(device=device).weight.data.fill_(1)
    model.model.layers = layers
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.requires_grad_(False)
    model.is_loaded_in_4bit, model.config.use_cache = True, False
    return model


def measure(arguments) -> dict:
    """One case: seconds a step, peak memory, and how fast weights come."""
    import torch

    from qlora_ray.config import Config
    from qlora_ray.model.adapter import add_adapter, trainable
    from qlora_ray.model.fused import fuse, fused_layers, keep
    from qlora_ray.model.homes import Away, DiskFile
    from qlora_ray.model.recompute import Choice, Keep
    from qlora_ray.model.ring import make_ring
    from qlora_ray.planning import deepspeed
    from qlora_ray.worker.engine import Engine
    from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

    is_cuda = arguments.device == "cuda"
    if is_cuda and arguments.case != "whole":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.cap * 2**30 / total))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29531 + os.getpid() % 1000), RANK="0", WORLD_SIZE="1",
                      LOCAL_RANK="0")  # fmt: skip
    torch.distributed.init_process_group("nccl" if is_cuda else "gloo")
    device, began = torch.device(arguments.device), time.perf_counter()
    bytes_ahead = int(arguments.layers * (5e6 if arguments.tiny else 0.47e9))
    file = DiskFile(arguments.disk, bytes_ahead) if arguments.case == "disk" else None
    away = None if arguments.case == "whole" else Away(file)
    config = Config.model_validate({"model": {"lora_r": RANK, "lora_alpha": RANK}})
    model = add_adapter(build(arguments, away), config.model, torch.bfloat16, SEED)
    line = fuse(model)
    ring = make_ring(model, away, device) if away else None
    keep(model, Choice((Keep.HOST,) * len(fused_layers(model))))
    num_trainable = sum(parameter.numel() for parameter in trainable(model).values())
    settings = deepspeed.defaults(config, 3, 1, "bfloat16", num_trainable)
    engine = Engine(model, config.training, {**settings, "train_micro_batch_size_per_gpu": arguments.rows})
    engine.train()
    told = {"case": arguments.case, "load_seconds": time.perf_counter() - began, "fused": line}
    if ring:
        told |= _bandwidth(ring, device)
        ring.keep_last(min(arguments.resident, len(ring.slabs)))
        told["resident"] = ring.num_resident
    generator, vocab = torch.Generator().manual_seed(SEED), model.config.vocab_size
    seconds, losses = [], []
    for number in range(arguments.warmup + arguments.steps):
        ids = torch.randint(3, vocab, (arguments.rows, arguments.length), generator=generator).to(device)
        batch = {"input_ids": ids, "labels": ids}
        _wait(device)
        at = time.perf_counter()
        loss = sum_of_nats(engine, batch) / num_label_tokens(batch)
        engine.backward(loss)
        engine.add_up(1)
        engine.step(LEARNING_RATE)
        _wait(device)
        if number >= arguments.warmup:
            seconds.append(time.perf_counter() - at)
        losses.append(float(loss))
    told |= {"seconds": min(seconds), "tokens_per_second": arguments.rows * arguments.length / min(seconds),
             "losses": losses, "device": torch.cuda.get_device_name(0) if is_cuda else "cpu"}  # fmt: skip
    if is_cuda:
        told["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    torch.distributed.destroy_process_group()
    return told


def _bandwidth(ring, device) -> dict:
    """GB/s of some slabs, one after the other, with nothing else to do."""
    _wait(device)
    at, slabs = time.perf_counter(), ring.slabs[:8]
    for number in range(len(slabs)):
        ring.fetch(number, 0)
    _wait(device)
    return {"gb_per_second": sum(slab.num_bytes for slab in slabs) / (time.perf_counter() - at) / 1e9}


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--cap", type=float, default=24, help="GiB that a process with weights away may take")
    parser.add_argument("--resident", type=int, default=0, help="last layers that stay on the GPU")
    parser.add_argument("--disk", help="a folder on a local disk: one case more")
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
    results = []
    for case in ("whole", "host", *(["disk"] if arguments.disk else [])):
        command = [sys.executable, "-m", "benchmarks.offload", "--case", case, *sys.argv[1:]]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            print(f"{case}: not done in {arguments.limit:g} s", file=sys.stderr)
            continue
        found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"{case}: failed\n{ran.stderr[-3000:]}", file=sys.stderr)
            continue
        results.append(json.loads(found[0].removeprefix("RESULT ")))
    _show(results)
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1))


def _show(results: list[dict]) -> None:
    print("| case | s a step | tokens/s | of whole | GB/s alone | peak GiB | resident | load s | losses |")
    print("|---" * 9 + "|")
    whole = next((r["tokens_per_second"] for r in results if r["case"] == "whole"), None)
    for r in results:
        share = f"{r['tokens_per_second'] / whole:.3f}" if whole else "-"
        print(f"| {r['case']} | {r['seconds']:.2f} | {r['tokens_per_second']:,.0f} | {share} | "
              f"{r.get('gb_per_second', 0):.1f} | {r.get('peak_gib', 0):.1f} | {r.get('resident', '-')} | "
              f"{r['load_seconds']:.0f} | {' '.join(f'{loss:.6f}' for loss in r['losses'])} |")  # fmt: skip


if __name__ == "__main__":
    main()
