"""Wall time of training steps: two Ray workers under ZeRO-3 against transformers' Trainer + PEFT in one process.

Both do the same work on the same machine, one after the other: the embedded base in NF4, LoRA r=16 on all linear
layers, float32, the same number of rows a step, without validation or generation.

    python -m benchmarks.quickstart_vs_trainer --steps 200
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS_PER_STEP = 16


def main() -> None:
    """Print one JSON object: seconds of both, whole and from first to last step, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=["trainer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(train_with_trainer(arguments.steps)))
        return
    ours = train_with_qlora_ray(arguments.steps)
    command = [
        sys.executable,
        "-m",
        "benchmarks.quickstart_vs_trainer",
        "--only",
        "trainer",
        "--steps",
        str(arguments.steps),
    ]
    began = time.perf_counter()
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    peer = json.loads(ran.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - began}
    ratio = {name: round(ours[name] / peer[name], 3) for name in ("seconds", "seconds_in_steps")}
    print(json.dumps({"qlora_ray": ours, "transformers_trainer": peer, "ours_over_trainer": ratio}, indent=1))


def train_with_qlora_ray(steps: int) -> dict[str, float]:
    """The product's own door, two workers."""
    with tempfile.TemporaryDirectory() as storage:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "qlora_ray.train", f"ray.storage_path={storage}", "ray.run_name=bench",
             f"training.max_steps={steps}", "data.validation_split=0", "evaluation.num_prompts=0",
             "logging.every_steps=10",
             "training.packing=false", "training.batch_size=8",
             f"checkpoint.every_steps={steps}"],
            check=True, capture_output=True,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        entries = [json.loads(line) for line in (Path(storage) / "bench" / "metrics.jsonl").read_text().splitlines()]
        lines = [entry for entry in entries if "loss" in entry]  # others time validations and checkpoints
        summary = json.loads((Path(storage) / "bench" / "summary.json").read_text())
    in_steps, before = 0.0, 0
    for line in lines:
        in_steps += line["step_seconds"] * (line["step"] - before)
        before = line["step"]
    return {
        "seconds": seconds, "seconds_in_steps": in_steps, "to_first_step": summary["seconds"]["to_first_step"],
        "last_loss": lines[-1]["loss"],
    }  # fmt: skip


def train_with_trainer(steps: int) -> dict[str, float]:
    """transformers.Trainer with PEFT on the same rows, one process with all cores."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    from qlora_ray.config import base_model_path
    from qlora_ray.data.examples import read_examples
    from qlora_ray.data.tokenize import IGNORE_INDEX, Encoder, load_tokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    base = base_model_path("embedded")
    tokenizer = load_tokenizer(base, None)
    rows = read_examples("data/sample_data.json", "data", Encoder(tokenizer, max_length=128))[0].to_pylist()

    def collate(some):
        width = -(-max(len(row["input_ids"]) for row in some) // 8) * 8
        pad = [width - len(row["input_ids"]) for row in some]
        return {
            "input_ids": torch.tensor(
                [r["input_ids"] + [tokenizer.pad_token_id] * n for r, n in zip(some, pad, strict=True)]
            ),
            "attention_mask": torch.tensor(
                [[1] * len(r["input_ids"]) + [0] * n for r, n in zip(some, pad, strict=True)]
            ),
            "labels": torch.tensor([r["labels"] + [IGNORE_INDEX] * n for r, n in zip(some, pad, strict=True)]),
        }

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS_PER_STEP, learning_rate=1e-3,
            lr_scheduler_type="cosine", warmup_steps=round(0.03 * steps), logging_steps=10, save_strategy="no",
            report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True, optim="adamw_torch",
        )  # fmt: skip
        trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate)
        began = time.perf_counter()
        trainer.train()
        in_steps = time.perf_counter() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds_in_steps": in_steps, "last_loss": float(losses[-1])}


if __name__ == "__main__":
    main()
