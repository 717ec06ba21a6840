"""Tokens per second and peak memory of one training step, ours and peers', side by side on one GPU.

    python -m benchmarks.throughput --shapes llama-8b qwen2.5-7b --variants ours ours_stage3 peft_liger unsloth

Each variant runs in a process of its own on the same random weights, data and LoRA start: NF4 with double quantization,
r=16 on all projections but those of experts, no dropout, AdamW. Mixtures of experts, for example:

    python -m benchmarks.throughput --shapes qwen3-30b-a3b --length 4096 --variants ours:input ours_experts:input

Unsloth runs where it is installed. Writes JSON and a Markdown table.
"""

# B rows in a micro-batch, T tokens per row
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "llama-8b": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "llama-70b": dict(model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                      num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "qwen2.5-32b": dict(model_type="qwen2", hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                        num_attention_heads=40, num_key_value_heads=8, vocab_size=152064, rope_theta=1e6),
    "mistral-7b": dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, vocab_size=32768, rope_theta=1e6,
                       sliding_window=None),
    "qwen2.5-7b": dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rope_theta=1e6),
    "qwen3-8b": dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936, rope_theta=1e6),
    "gemma3-4b": dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
                      num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=262208,
                      sliding_window=1024),
    "phi-4-mini": dict(model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                       num_attention_heads=24, num_key_value_heads=8, vocab_size=200064, partial_rotary_factor=0.75),
    "granite-3-8b": dict(model_type="granite", hidden_size=4096, intermediate_size=12800, num_hidden_layers=40,
                         num_attention_heads=32, num_key_value_heads=8, vocab_size=49155, residual_multiplier=0.22,
                         attention_multiplier=0.0078125, embedding_multiplier=12.0, logits_scaling=16.0),
    "olmo2-7b": dict(model_type="olmo2", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=32, vocab_size=100352),
    "smollm3-3b": dict(model_type="smollm3", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                       num_attention_heads=16, num_key_value_heads=4, vocab_size=128256),
    "glm4-9b": dict(model_type="glm4", hidden_size=4096, intermediate_size=13696, num_hidden_layers=40,
                    num_attention_heads=32, num_key_value_heads=2, head_dim=128, vocab_size=151552),
    "qwen3-30b-a3b": dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
                          num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
                          rope_theta=1e6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
                          norm_topk_prob=True),
    "mixtral-8x7b": dict(model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, rope_theta=1e6,
                         num_local_experts=8, num_experts_per_tok=2),
    "gpt-oss-20b": dict(model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
                        num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088,
                        num_local_experts=32, num_experts_per_tok=4),
    "tiny-moe": dict(model_type="qwen3_moe", hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=2048, num_experts=8,
                     num_experts_per_tok=2, moe_intermediate_size=64),
    "gpt2-medium": dict(model_type="gpt2", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                        num_attention_heads=16, num_key_value_heads=16, vocab_size=50257),
    "tiny": dict(model_type="llama", hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, vocab_size=2048),
}  # fmt: skip
PEAK_FLOPS = 795e12  # bf16 matrix products measured on an H200 (8192 x 8192 x 8192, random data)
LEARNING_RATE, SEED, RANK = 2e-4, 0, 16
MLP = ("gate_proj", "up_proj", "down_proj")


def shape_of(name: str, num_layers: int | None) -> dict:
    """A shape, with as many of its layers as are asked for."""
    return {**SHAPES[name], **({"num_hidden_layers": num_layers} if num_layers else {})}


def floor_tokens_per_second(shape: dict, length: int, rank: int = RANK) -> float:
    """Tokens a second if matrix products alone took time, at PEAK_FLOPS, nothing recomputed."""
    hidden, heads, kv = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape.get("head_dim", hidden // heads)
    sides = [(hidden, heads * head_dim), (hidden, kv * head_dim), (hidden, kv * head_dim), (heads * head_dim, hidden)]
    inner = shape.get("moe_intermediate_size", shape["intermediate_size"]) * shape.get("num_experts_per_tok", 1)
    lora = shape["num_hidden_layers"] * sum(rank * (a + b) for a, b in sides)  # experts get none
    sides += [(hidden, inner)] * (2 if shape["model_type"] == "gpt2" else 3)  # without a gate
    layers = shape["num_hidden_layers"]
    frozen = layers * sum(a * b for a, b in sides) + hidden * shape["vocab_size"]
    if "num_experts_per_tok" not in shape:
        lora = layers * sum(rank * (a + b) for a, b in sides)
    attention = layers * 2 * length * heads * head_dim * 3.5  # causal; backward computes the scores again
    return PEAK_FLOPS / (4 * frozen + 6 * lora + attention)


def build_base(shape: dict, device: str):
    """A random model with linear layers and experts in NF4, as load_base would have loaded it, a layer at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_ray.config import QuantizationConfig
    from qlora_ray.model.base import four_bit_config
    from qlora_ray.model.routed import compute_in_4_bits

    torch.manual_seed(SEED)
    config = AutoConfig.for_model(
        max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stack = "h" if shape["model_type"] == "gpt2" else "layers"
    layers = getattr(model.base_model, stack)
    setattr(model.base_model, stack, torch.nn.ModuleList())
    for part in (model, *layers):
        part.to_empty(device=device).apply(model._init_weights)
        if part is not model:
            _pack(part, four_bit_config(QuantizationConfig(), torch.bfloat16), device)
    setattr(model.base_model, stack, layers)
    compute_in_4_bits(model)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    model.config.use_cache = False
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def _pack(layer, four_bit, device: str) -> None:
    """Put the linear layers and the experts of a decoder layer in NF4."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.pytorch_utils import Conv1D

    from qlora_ray.model.experts import pack

    for parent in list(layer.modules()):
        pack(parent, four_bit)
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear | Conv1D):
                values = linear.weight.data.t() if isinstance(linear, Conv1D) else linear.weight.data  # (rows, columns)
                with torch.device("meta"):
                    packed = Linear4bit(values.shape[1], values.shape[0], linear.bias is not None,
                                        compute_dtype=torch.bfloat16, quant_type="nf4")  # fmt: skip
                packed.weight = Params4bit(values, requires_grad=False, quant_type="nf4", module=packed)
                packed.bias = linear.bias
                packed.support_avx512bf16_for_cpu = False
                setattr(parent, name, packed.to(device))


def ours(arguments, shape: dict):
    """The product's model; with stage0 or stage3 in its engine too, dora as DoRA, experts adapted. Returns a step, and the share
    of weights in 4 bits."""
    import torch

    from qlora_ray.config import Config
    from qlora_ray.model.adapter import add_adapter, trainable
    from qlora_ray.model.fused import fuse, fused_layers, keep
    from qlora_ray.model.plain import keep_plain, plain_layers
    from qlora_ray.model.recompute import Choice, Keep
    from qlora_ray.model.stash import HostStash
    from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

    variant = "dora" if "dora" in arguments.variant.split("_") else "lora"
    settings = {"lora_r": RANK, "lora_alpha": RANK, "lora_variant": variant}
    settings["expert_lora"] = "experts" in arguments.variant.split("_")
    config = Config.model_validate({"model": settings})
    model = add_adapter(build_base(shape, arguments.device), config.model, torch.bfloat16, SEED)
    print(fuse(model))
    share = four_bit_share(model)
    levels = [Keep[name.upper()] for name in arguments.keep if name != "weights"]
    num_layers, plain = len(fused_layers(model)), plain_layers(model)
    if plain and arguments.keep != ["all"]:
        model.enable_input_require_grads()
        stash = HostStash(torch.device(arguments.device)) if arguments.device == "cuda" else None
        keep_plain(plain, (levels * len(plain))[: len(plain)], stash)
    keep(model, Choice(tuple((levels * num_layers)[:num_layers]), num_layers * ("weights" in arguments.keep)))
    model.train()
    stage = next((part.removeprefix("stage") for part in arguments.variant.split("_") if "stage" in part), "")
    if not stage:
        optimizer = _adamw(model)

        def step(batch, lap):
            nats = sum_of_nats(model, batch)
            loss = nats / num_label_tokens(batch)
            lap("forward")
            loss.backward()
            lap("backward")
            optimizer.step()
            optimizer.zero_grad()
            lap("step")
            return loss

        return step, share
    num_trainable = sum(parameter.numel() for parameter in trainable(model).values())
    from qlora_ray.planning import deepspeed
    from qlora_ray.worker.engine import Engine

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29531 + os.getpid() % 1000), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    torch.distributed.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    settings = deepspeed.defaults(config, int(stage), 1, "bfloat16", num_trainable)
    engine = Engine(model, config.training, {**settings, "train_micro_batch_size_per_gpu": arguments.batch_size})
    engine.train()

    def step_engine(batch, lap):
        nats = sum_of_nats(engine, batch)
        loss = nats / num_label_tokens(batch)
        lap("forward")
        engine.backward(loss)
        engine.add_up(1)
        lap("backward")
        engine.step(LEARNING_RATE)
        lap("step")
        return loss.detach()

    return step_engine, share


def peft(arguments, shape: dict):
    """transformers + PEFT: `peft` as its documentation says, `peft_liger` with Liger kernels and 16-bit LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    base = build_base(shape, arguments.device)
    liger, recompute = arguments.variant.startswith("peft_liger"), arguments.keep != ["all"]
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(base)
    else:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=recompute)
    if recompute:
        base.gradient_checkpointing_enable({"use_reentrant": True})
        base.enable_input_require_grads()
    torch.manual_seed(SEED)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(base, lora, autocast_adapter_dtype=not liger)
    if liger:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    model.train()
    return _plain_step(model)


def unsloth(arguments, shape: dict):
    """Unsloth with its own loader and defaults."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        arguments.checkpoint, max_seq_length=arguments.length, load_in_4bit=True, dtype=None, local_files_only=True
    )
    import torch

    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    has_experts = "num_experts_per_tok" in shape
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", random_state=SEED,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *([] if has_experts else MLP)],
        use_gradient_checkpointing=False if arguments.keep == ["all"] else "unsloth",
    )  # fmt: skip
    model.train()
    return _plain_step(model)


def _plain_step(model):
    optimizer = _adamw(model)

    def step(batch, lap):
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        lap("forward")
        loss.backward()
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("step")
        return loss

    return step, four_bit_share(model)


def four_bit_share(model) -> float:
    """Of a model's weights, how much is in 4 bits."""
    from qlora_ray.model.base import count_bytes

    stored = count_bytes(model)
    return stored.four_bit_parameters / stored.parameters


def _adamw(model):
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


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
        "four_bit_share": share, "loss_first": float(losses[0]), "loss_last": float(losses[-1]), "load_seconds": load_seconds,
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


def checkpoint_of(name: str, num_layers: int | None, folder: str) -> Path:
    """Where `save_checkpoint` writes."""
    return Path(folder) / (f"{name}-{num_layers}" if num_layers else name)


def save_checkpoint(name: str, folder: str, device: str, num_layers: int | None = None) -> str:
    """Random weights of a shape as a 16-bit checkpoint, for loaders that want one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlora_ray.config import base_model_path

    target = checkpoint_of(name, num_layers, folder)
    if not (target / "config.json").exists():
        torch.manual_seed(SEED)
        config = AutoConfig.for_model(
            max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            architectures=None, **shape_of(name, num_layers),
        )  # fmt: skip
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(base_model_path("embedded")).save_pretrained(target)
    return str(target)


def save_rows(folder: str, length: int, count: int = 200) -> Path:
    """Records that each fill `length` tokens and more, a random word being several: `count`, of long rows fewer."""
    words, count = [f"{random.Random(n).randrange(36**5):x}" for n in range(500)], min(count, max(8, 2**21 // length))
    path = Path(folder, f"rows_{length}_{count}.jsonl")
    with path.open("w") as file:
        for row in range(count):
            text = " ".join(random.Random(row).choices(words, k=length // 4))
            file.write(json.dumps({"instruction": "Go on.", "input": "", "output": text}) + "\n")
    return path


def save_chats(folder: str) -> Path:
    """2,000 chats of log-normal lengths, whose answers are a third of their text."""
    words, path = [f"{random.Random(n).randrange(36**5):x}" for n in range(500)], Path(folder, "chats.jsonl")
    with path.open("w") as file:
        for row in range(2000):
            pick = random.Random(row)
            turns = []
            for _ in range(pick.randint(1, 3)):
                length = max(3, int(pick.lognormvariate(3.0, 0.8)))
                for role, factor in (("user", 2), ("assistant", 1)):
                    turns.append({"role": role, "content": " ".join(pick.choices(words, k=factor * length))})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


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
