"""Loss curves of the fused path and of stock PEFT + bitsandbytes on the embedded base, over several seeds.

    python -m benchmarks.quality --steps 200 --seeds 3

Both start from the same LoRA and see the same batches; what separates them must stay within what separates seeds.
"""

import argparse
import json
from pathlib import Path

ROWS, WINDOW = 16, 50


def encode(tokenizer, record: dict) -> tuple[list[int], list[int]]:
    """Token ids, and labels that ignore the question."""
    question = {"role": "user", "content": f"{record['instruction']}\n\n{record['input']}"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(
        [question, {"role": "assistant", "content": record["output"]}], tokenize=False
    )
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return ids, [-100] * start + ids[start:]


def curve(fused: bool, seed: int, steps: int, device: str) -> list[float]:
    """Nats per answer token of each step."""
    import torch
    from transformers import AutoTokenizer

    from qlora_ray.config import Config, base_model_path, bundled_root
    from qlora_ray.model.adapter import add_adapter, trainable
    from qlora_ray.model.base import load_base
    from qlora_ray.model.fused import fuse
    from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

    config = Config()
    dtype = "bfloat16" if device == "cuda" else "float32"
    base = load_base(config.model, config.quantization, dtype, torch.device(device))
    model = add_adapter(base, config.model, getattr(torch, dtype), seed)
    if fused:
        print(fuse(model))
    tokenizer = AutoTokenizer.from_pretrained(base_model_path("embedded"))
    records = json.loads((bundled_root() / "data" / "sample_data.json").read_text())
    rows = [encode(tokenizer, record) for record in records]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3, weight_decay=0.0)
    model.train()
    losses = []
    for _ in range(steps):
        some = [rows[i] for i in torch.randint(len(rows), (ROWS,), generator=generator)]
        width = -(-max(len(ids) for ids, _ in some) // 8) * 8
        batch = {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in some], device=device),
            "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in some], device=device),
        }
        loss = sum_of_nats(model, batch) / num_label_tokens(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="runs/quality.json")
    arguments = parser.parse_args()
    curves = {
        name: [curve(name == "fused", seed, arguments.steps, arguments.device) for seed in range(arguments.seeds)]
        for name in ("fused", "peft")
    }
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(curves))
    ends = {name: [sum(losses[-WINDOW:]) / WINDOW for losses in some] for name, some in curves.items()}
    apart = max(abs(a - b) for a, b in zip(*ends.values(), strict=True))
    print(f"mean loss of the last {WINDOW} of {arguments.steps} steps, by seed: {ends}")
    between = max(ends["peft"]) - min(ends["peft"])
    print(f"fused against PEFT, same seed: at most {apart:.4f}; between seeds: {between:.4f}")


if __name__ == "__main__":
    main()
