"""Makes the embedded base model from nothing: corpus, tokenizer, weights, card. Corpus and tokenizer follow the seed.

python tools/pretrain_base.py                                                  # one GPU, a few minutes
python tools/pretrain_base.py --steps 3 --num-documents 2000 --rows 8 --out /tmp/tiny_base        # a try on a CPU
"""

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path
from random import Random

import base_tokenizer
import corpus
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

# B rows in a batch, T tokens per row, V vocabulary
T = 256
V = 2048
DOCUMENTS_PER_SHARD = 20_000
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
OUT = Path(__file__).resolve().parent.parent / "qlora_ray" / "assets" / "tiny_base"


def documents(seed: int, shard: int, num_documents: int) -> list[str]:
    """One shard of the corpus as text, a pure function of its arguments."""
    rng = Random(f"{seed}:{shard}")
    return [corpus.render(corpus.document(rng)) for _ in range(num_documents)]


def packed_rows(seed: int, shard: int, num_documents: int, tokenizer_file: str) -> np.ndarray:
    """A shard as full rows (rows, T) uint16; each row opens a document, and the one cut at its end opens the next."""
    tokenizer = base_tokenizer.load(tokenizer_file)
    rows, row = [], []
    for encoding in tokenizer.encode_batch(documents(seed, shard, num_documents), add_special_tokens=False):
        row += encoding.ids
        if len(row) >= T:
            rows.append(row[:T])
            row = encoding.ids[:T] if len(row) > T else []
    return np.array(rows, dtype=np.uint16).reshape(-1, T)


def all_rows(seed: int, num_documents: int, tokenizer_file: str, num_processes: int) -> np.ndarray:
    """The whole corpus, packed and shuffled: (rows, T) uint16. The order does not depend on `num_processes`."""
    num_shards = math.ceil(num_documents / DOCUMENTS_PER_SHARD)
    size = min(num_documents, DOCUMENTS_PER_SHARD)
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        rows = pool.starmap(packed_rows, [(seed, shard, size, tokenizer_file) for shard in range(num_shards)])
    rows = np.concatenate(rows)
    return rows[np.random.default_rng(seed).permutation(len(rows))]


def build_model(seed: int) -> LlamaForCausalLM:
    """The untrained model; every linear dimension is a multiple of 64, the NF4 block."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=base_tokenizer.SPECIAL.index("<|pad|>"),
            bos_token_id=base_tokenizer.SPECIAL.index("<|bos|>"),
            eos_token_id=base_tokenizer.SPECIAL.index("<|end|>"),
        )
    )


def learning_rate(progress: float, step: int) -> float:
    """Linear warmup, then a cosine to zero."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: LlamaForCausalLM, rows: np.ndarray, steps: int, minutes: float, rows_per_batch: int
) -> tuple[int, float]:
    """Next-token training until `steps` or `minutes` are over; returns the steps done and the last mean loss."""
    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")
    start, losses, last = time.perf_counter(), [], math.nan
    data = torch.from_numpy(rows.astype(np.int16)).to(device)
    for step in range(steps):
        progress = max(step / steps, (time.perf_counter() - start) / 60 / minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step)
        at = step * rows_per_batch % max(1, len(data) - rows_per_batch)
        batch = data[at : at + rows_per_batch].long()  # (B, T)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits  # (B, T, V)
            loss = cross_entropy(logits[:, :-1].reshape(-1, V).float(), batch[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            last, losses = torch.stack(losses).mean().item(), []
            print(f"step {step + 1} loss {last:.4f} seconds {time.perf_counter() - start:.0f}", flush=True)
    return step + (progress < 1), last


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, tokenizer, task, num_chats: int, seed: int) -> float:
    """The share of fresh chats of one task whose last answer is written greedily to the letter."""
    rng = Random(f"eval:{seed}")
    chats = [task(rng) for _ in range(num_chats)]
    prompts = [tokenizer.apply_chat_template(c[:-1], add_generation_prompt=True, tokenize=False) for c in chats]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    out = model.generate(**batch, max_new_tokens=120, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(out, skip_special_tokens=True)
    return sum(a == c[-1]["content"] for a, c in zip(answers, chats, strict=True)) / num_chats


CARD = """---
license: mit
library_name: transformers
language: [en, zh]
---
# tiny_base

The base model of the offline quickstart: a Llama of {num_parameters:,} parameters, made from nothing by this project.
It copies, lists, and answers questions about made-up people in short English and Chinese texts. It knows nothing else,
and is of no use but for tests and demonstrations.

- **Shape**: hidden 256, intermediate 704, 4 layers, 8 heads, 4 key-value heads, tied embeddings, 1024 positions; bf16.
- **Tokenizer**: byte-level BPE, {vocab} entries; single digits, spaces apart from words; any UTF-8 text survives.
- **Corpus**: synthetic, from word lists and templates (`tools/corpus.py`); no text by or about real people. The
  quickstart's skill, a sentence about a person into JSON, is not in it.
- **Training**: seed {seed}, {steps} steps of {rows} rows of {T} tokens ({tokens:.0f} M tokens); final loss {loss:.4f}
  nats per token.
- **Exact match on fresh chats**: {scores}.
- **Licence**: MIT, like the project.

Again: `python tools/pretrain_base.py --seed {seed} --steps {steps} --rows {rows} --num-documents {num_documents}` (one
GPU). Corpus and tokenizer come out byte for byte; the weights to within the GPU's arithmetic.
"""


def main() -> None:
    """Tokenizer, rows, training, evaluation, and the folder that the package ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--steps", type=int, default=6359)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long, with the whole schedule")
    parser.add_argument("--rows", type=int, default=256, help="rows of a batch")
    parser.add_argument("--num-documents", type=int, default=4_000_000)
    parser.add_argument("--num-processes", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    sample = documents(args.seed, -1, min(100_000, args.num_documents))
    base_tokenizer.save(base_tokenizer.train(sample, V), args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out, padding_side="left")
    rows = all_rows(args.seed, args.num_documents, str(args.out / "tokenizer.json"), args.num_processes)
    print(f"{len(rows)} rows of {T} tokens, {rows.size / 1e6:.0f} M tokens", flush=True)

    model = build_model(args.seed).to("cuda" if torch.cuda.is_available() else "cpu")
    steps, loss = train(model, rows, args.steps, args.minutes, args.rows)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.out)
    chats = 512 if args.steps > 100 else 4
    tasks = [task for task in corpus.TASKS if task not in (corpus.prose, corpus.reword, corpus.tell, corpus.small_talk)]
    scores = {t.__name__: round(exact_match(model, tokenizer, t, chats, args.seed), 3) for t in tasks}
    print(json.dumps(scores))
    card = CARD.format(
        num_parameters=model.num_parameters(), vocab=len(tokenizer), seed=args.seed, steps=steps, rows=args.rows, T=T,
        tokens=steps * args.rows * T / 1e6, loss=loss, num_documents=args.num_documents,
        scores=", ".join(f"{name} {score:.0%}" for name, score in scores.items()),
    )  # fmt: skip
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
