"""Pairs per second and peak memory of DPO, ours and TRL's, on the same pairs and a random model of a real shape.

    python -m benchmarks.preferences                              # every side that this machine has GPUs for
    python -m benchmarks.preferences --sides ours trl --layers 8
    python -m benchmarks.preferences --shape tiny --device cpu --layers 2 --length 64 --pairs 2

Pairs of a prompt of about two thirds of --length tokens and two answers of a third. Ours is `python -m qlora_ray.train`
(Ray Train, DeepSpeed), TRL's its DPOTrainer with PEFT and bitsandbytes, and on a GPU Liger's kernels, with and without
recomputation; both know the reference's log-probabilities before the first step. `ours_lean` may take no more memory
than TRL as it comes. NF4 with double quantization, r=16 on all linear layers, no dropout. Each side is a process of its
own with a time limit, and loads the model once. Prints a table and JSON, also to $OUT/preferences.json. Peaks of ours
count loading and the reference, TRL's training alone.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import product
from benchmarks.bases import checkpoint_of, save_checkpoint
from benchmarks.shapes import SHAPES

NUM_PAIRS, WARMUP = 240, 5
ONE, APART = ["training.share_prompts=true"], ["training.share_prompts=false"]
TRLS_PEAK_GIB = 10.9  # of the side `trl` at 8 pairs of 600 tokens: benchmarks/README.md
OURS = {
    "ours": ONE, "ours_apart": APART, **{f"ours_on_{count}": [*ONE, f"ray.num_workers={count}"] for count in (2, 4, 8)},
    "ours_lean": [*ONE, f"training.memory_budget_gib={TRLS_PEAK_GIB - 0.3:.1f}"],
}  # fmt: skip
TRLS = {"trl": True, "trl_keeps_all": False}  # whether it recomputes


def main() -> None:
    arguments = read_arguments()
    if arguments.only == "checkpoint":
        save_checkpoint(arguments.shape, arguments.folder, arguments.device, arguments.layers)
        save_pairs(arguments)
        print("RESULT {}")
        return
    if arguments.only:
        print("RESULT " + json.dumps(run_side(arguments.only, arguments)))
        return
    run("checkpoint", arguments)
    found = {side: run(side, arguments) for side in arguments.sides}
    table = "\n".join(lines_of(found))
    print(table)
    whole = json.dumps({"arguments": vars(arguments), "sides": found}, indent=1)
    print(whole)
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "preferences.json").write_text(whole)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = [*OURS, *TRLS]
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="so many of the shape's layers")
    parser.add_argument("--sides", nargs="+", default=sides, choices=sides)
    parser.add_argument("--length", type=int, default=600, help="tokens of a prompt with one answer, about")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step and GPU, about; rows of ours are packed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=130, help="time limit of each side")
    parser.add_argument("--folder", default="/tmp/throughput_checkpoints")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=["checkpoint", *sides], help=argparse.SUPPRESS)
    return parser.parse_args()


def run(side: str, arguments: argparse.Namespace) -> dict:
    """What a side measured in a process of its own; where it failed or took too long, an `error`."""
    command = [sys.executable, "-m", "benchmarks.preferences", "--only", side]
    for name in ("shape", "layers", "length", "pairs", "steps", "folder", "device"):
        value = getattr(arguments, name)
        command += [] if value is None else [f"--{name}", str(value)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        try:
            out, errors = process.communicate(timeout=arguments.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, errors = process.communicate()
            errors += f"\nstopped after {arguments.seconds} s"
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[0].removeprefix("RESULT ")) if lines else {"error": errors[-3000:]}
    print(f"{side}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return {**found, "wall_seconds": time.perf_counter() - began}


def run_side(side: str, arguments: argparse.Namespace) -> dict:
    """Train, here or in the product's processes."""
    if side in TRLS:
        return train_with_trl(arguments, recomputes=TRLS[side])
    wanted = int(side.partition("_on_")[2] or 1)
    if arguments.device == "cuda" and wanted > 1:
        import torch

        if torch.cuda.device_count() < wanted:
            sys.exit(f"needs {wanted} GPUs")
    base, max_length = checkpoint_of(arguments.shape, arguments.layers, arguments.folder), 4 * arguments.length
    # A row holds up to twice max_length tokens of pairs, each of which has twice the length.
    rows = max(1, arguments.pairs * arguments.length // max_length)
    made = product.train([
        f"model.base_model={base}", "model.lora_alpha=16", "training.objective=dpo", f"training.batch_size={rows}",
        f"training.max_length={max_length}", f"training.learning_rate={RATE}",
        f"data.train_file={pairs_file(arguments)}", f"ray.storage_path={Path(arguments.folder) / 'runs'}",
        f"ray.run_name=preferences_{side}_{time.time_ns()}", *OURS[side],
    ], arguments.steps)  # fmt: skip
    return {
        "pairs_per_second": made["samples_per_second"] / 2, "peak_gib": made["peak_gib"], "steps": made["steps"],
        "log": made["log"],
    }  # fmt: skip


RATE = 5e-6


def pairs_file(arguments: argparse.Namespace) -> Path:
    return Path(arguments.folder, f"pairs_{arguments.length}.jsonl")


def save_pairs(arguments: argparse.Namespace) -> None:
    """NUM_PAIRS records of random words: prompts of half to five sixths of --length tokens, answers of a third."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(arguments.shape, arguments.layers, arguments.folder))
    words = [f"{random.Random(n).randrange(36**5):x}" for n in range(500)]

    def text(pick: random.Random, share: float) -> str:
        num_tokens = max(2, round(arguments.length * share * pick.uniform(0.75, 1.25)))
        ids = tokenizer(" ".join(pick.choices(words, k=num_tokens)))["input_ids"]
        return tokenizer.decode(ids[:num_tokens]).strip()

    with pairs_file(arguments).open("w") as file:
        for number in range(NUM_PAIRS):
            pick = random.Random(number)
            prompt, chosen, rejected = (text(pick, share) for share in (2 / 3, 1 / 3, 1 / 3))
            record = {"prompt": prompt, "chosen": " a " + chosen, "rejected": " b " + rejected}
            file.write(json.dumps(record) + "\n")


def train_with_trl(arguments: argparse.Namespace, recomputes: bool) -> dict:
    """As TRL's documentation shows QLoRA, and everything that it offers for speed."""
    import importlib.util

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    base, cuda = str(checkpoint_of(arguments.shape, arguments.layers, arguments.folder)), arguments.device == "cuda"
    has_liger = cuda and importlib.util.find_spec("liger_kernel") is not None
    dtype = torch.bfloat16 if cuda else torch.float32
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=four_bit, dtype=dtype, device_map={"": 0} if cuda else None
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    settings = DPOConfig(
        output_dir=str(Path(arguments.folder) / "trl"), max_steps=arguments.steps, learning_rate=RATE,
        per_device_train_batch_size=arguments.pairs, precompute_ref_log_probs=True, max_length=4 * arguments.length,
        use_liger_kernel=has_liger, gradient_checkpointing=recomputes, bf16=cuda, use_cpu=not cuda,
        logging_steps=max(1, arguments.steps // 5), save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer = DPOTrainer(
        model=model, args=settings, processing_class=AutoTokenizer.from_pretrained(base), callbacks=[Clock()],
        train_dataset=load_dataset("json", data_files=str(pairs_file(arguments)), split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    if cuda:  # what loading and the reference took is not counted: of ours it is
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = [after - before for before, after in zip(ends[WARMUP:], ends[WARMUP + 1 :], strict=False)]
    return {
        "pairs_per_second": arguments.pairs / statistics.median(seconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None, "liger": has_liger,
        "steps": [(entry["step"], round(entry["loss"], 4)) for entry in trainer.state.log_history if "loss" in entry],
    }  # fmt: skip


def lines_of(found: dict[str, dict]) -> list[str]:
    """A Markdown table of the sides, each beside TRL's fastest."""
    peers = [found[side]["pairs_per_second"] for side in TRLS if "pairs_per_second" in found.get(side, {})]
    lines = ["| side | pairs/s | against TRL's fastest | peak GiB |", "|---|---|---|---|"]
    for side, made in found.items():
        if "error" in made:
            lines.append(f"| {side} | {made['error'].strip().splitlines()[-1][:90]} | | |")
            continue
        against = f"{made['pairs_per_second'] / max(peers):.2f}" if peers else ""
        peak = "" if made["peak_gib"] is None else f"{made['peak_gib']:.1f}"
        lines.append(f"| {side} | {made['pairs_per_second']:.2f} | {against} | {peak} |")
    speeds = {side: made["pairs_per_second"] for side, made in found.items() if "pairs_per_second" in made}
    for side, other, what in (("ours", "ours_apart", "shared prompts"), ("ours_on_2", "ours", "2 GPUs against one")):
        if {side, other} <= speeds.keys():
            lines.append(f"{what}: {speeds[side] / speeds[other]:.2f}")
    return lines


if __name__ == "__main__":
    main()
