"""The plain template's settings on a gpt2-medium (DialoGPT) shape, against transformers' Trainer + PEFT + bitsandbytes.

    python -m benchmarks.template_vs_trainer

One GPU, one worker; NF4, LoRA r=16 with dropout 0.1 on all linear layers, bfloat16, 4 rows of 512 tokens. The Trainer
has the same weights and rows, keeps everything for backward (recomputation would only slow it), and takes its usual
AdamW. Tokens per second of the median step after the first ten; of ours, after the first five.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import product
from benchmarks.bases import save_checkpoint
from benchmarks.records import save_rows

ROWS, LENGTH, STEPS, WARMUP = 4, 512, 60, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-medium")
    parser.add_argument("--folder", default="/tmp/throughput_checkpoints")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=["trainer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = save_checkpoint(arguments.shape, arguments.folder, arguments.device)
    rows = save_rows(arguments.folder, LENGTH)
    if arguments.only:
        print("RESULT " + json.dumps(train_with_trainer(base, rows, arguments.device)))
        return
    ours = product.train([
        f"model.base_model={base}", "model.lora_dropout=0.1", f"training.max_length={LENGTH}",
        f"training.batch_size={ROWS}", f"training.max_steps={STEPS}", f"data.train_file={rows}",
        f"ray.storage_path={Path(arguments.folder) / 'runs'}", f"ray.run_name=template_{time.time_ns()}",
    ])  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.template_vs_trainer", "--only", "trainer"]
    command += [word for name in ("shape", "folder", "device") for word in (f"--{name}", getattr(arguments, name))]
    ran = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.exit(ran.stderr[-3000:])
    peer = json.loads(found[0].removeprefix("RESULT "))
    told = ("tokens_per_second", "peak_gib", "phases", "steps", "log")
    print(json.dumps({
        "qlora_ray": {name: ours[name] for name in told}, "trainer": peer,
        "ours_over_trainer": ours["tokens_per_second"] / peer["tokens_per_second"],
    }, indent=1))  # fmt: skip


def train_with_trainer(base: str, rows: Path, device: str) -> dict[str, float]:
    """As their documentation shows."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

    from qlora_ray.data.examples import read_examples
    from qlora_ray.data.tokenize import Encoder, load_tokenizer

    records = read_examples(str(rows), "data", Encoder(load_tokenizer(base, None), max_length=LENGTH))[0].to_pylist()
    assert all(len(record["input_ids"]) == LENGTH for record in records)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(model, lora)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=2e-4, bf16=device == "cuda",
            use_cpu=device == "cpu", logging_steps=10, save_strategy="no", report_to=[], remove_unused_columns=False,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=settings, train_dataset=records, callbacks=[Clock()],
            data_collator=lambda some: {
                name: torch.tensor([record[name] for record in some]) for name in ("input_ids", "labels")
            },
        )  # fmt: skip
        trainer.train()
    seconds = [after - before for before, after in zip(ends[WARMUP:], ends[WARMUP + 1 :], strict=False)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return {
        "tokens_per_second": ROWS * LENGTH / statistics.median(seconds), "peak_gib": peak, "last_loss": losses[-1]
    }  # fmt: skip


if __name__ == "__main__":
    main()
