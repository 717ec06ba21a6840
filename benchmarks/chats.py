"""Chats of real lengths: ours through `python -m qlora_ray.train`, packed, and Unsloth with packing or padding-free.

    python -m benchmarks.chats --layers 8 --sides ours unsloth_packing unsloth_padding_free

The same 2,000 chats of log-normal lengths, a third of whose tokens are answers; ours learns those alone, Unsloth all,
nothing recomputed in either. Tokens without padding, per second of the median step. Each side is a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import product
from benchmarks.bases import checkpoint_of, save_checkpoint
from benchmarks.records import save_chats
from benchmarks.shapes import RANK, SHAPES
from benchmarks.variants import MLP

LENGTH, ROWS, STEPS, WARMUP = 2048, 4, 25, 5
PEERS = ("unsloth_packing", "unsloth_padding_free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sides", nargs="+", default=["ours", *PEERS], choices=["ours", *PEERS])
    parser.add_argument("--folder", default="/tmp/throughput_checkpoints")
    parser.add_argument("--only", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        import unsloth as _  # noqa: F401 - patches transformers and trl, so it comes first

        print("RESULT " + json.dumps(train_with_unsloth(arguments)))
        return
    base = save_checkpoint(arguments.shape, arguments.folder, "cuda", arguments.layers)
    chats, found = save_chats(arguments.folder), {}
    for side in arguments.sides:
        found[side] = ours(base, chats, arguments.folder) if side == "ours" else _apart(side, arguments)
        print(side, json.dumps(found[side]), flush=True)
    for side in set(PEERS) & found.keys() if "ours" in found else ():
        print(f"ours / {side}: {found['ours']['tokens_per_second'] / found[side]['tokens_per_second']:.3f}")


def ours(base: str, chats: Path, folder: str) -> dict:
    """The ordinary path."""
    measured = product.train([
        f"model.base_model={base}", "training.packing=true", f"training.max_length={LENGTH}",
        f"training.batch_size={ROWS}", f"data.train_file={chats}", f"ray.storage_path={Path(folder) / 'runs'}",
        f"ray.run_name=chats_{time.time_ns()}",
    ], STEPS)  # fmt: skip
    return {name: measured[name] for name in ("tokens_per_second", "peak_gib")}


def _apart(side: str, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, "-m", "benchmarks.chats", "--only", side, "--shape", arguments.shape]
    command += ["--layers", str(arguments.layers), "--folder", arguments.folder]
    ran = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.exit(f"{side}: failed\n{ran.stdout[-1500:]}\n{ran.stderr[-3000:]}")
    return json.loads(found[0].removeprefix("RESULT "))


def train_with_unsloth(arguments: argparse.Namespace) -> dict:
    """As its notebooks do, with nothing recomputed."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoint_of(arguments.shape, arguments.layers, arguments.folder)), max_seq_length=LENGTH,
        load_in_4bit=True, dtype=None, local_files_only=True,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", use_gradient_checkpointing=False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *MLP],
    )  # fmt: skip
    chats = [json.loads(line)["messages"] for line in save_chats(arguments.folder).read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    packs = arguments.only == "unsloth_packing"
    rows = ROWS if packs else ROWS * LENGTH // 330  # chats have about 330 tokens
    settings = SFTConfig(
        output_dir=str(Path(arguments.folder) / "unsloth"), dataset_text_field="text", max_length=LENGTH,
        packing=packs, padding_free=True, per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        max_steps=STEPS, learning_rate=2e-4, bf16=True, optim="adamw_torch_fused", logging_steps=5, save_strategy="no",
        report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_dict({"text": texts}), args=settings
    )
    tokens, ends, plain = [], [], trainer.training_step

    def training_step(model, inputs, *more, **others):
        loss = plain(model, inputs, *more, **others)
        tokens.append(int((inputs["input_ids"] != tokenizer.pad_token_id).sum()))  # waits for the GPU
        ends.append(time.perf_counter())
        return loss

    trainer.training_step = training_step
    trainer.train()
    speeds = [count / (b - a) for count, a, b in zip(tokens[1:], ends, ends[1:], strict=False)]
    return {
        "tokens_per_second": statistics.median(speeds[WARMUP:]), "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "tokens_per_step": statistics.median(tokens), "last_loss": trainer.state.log_history[-2].get("loss"),
    }  # fmt: skip


if __name__ == "__main__":
    main()
