"""The same training without Ray and DeepSpeed: one process, PyTorch and PEFT, the loss written out by hand."""

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def train(
    base: str,
    records: list[dict],
    batches: list[list[int]],
    learning_rates: list[float],
    lora: dict,
    seed: int,
    max_norm: float,
) -> list[float]:
    """Losses (nats per answer token) of one optimizer step per batch of record numbers."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    model.train()
    losses = []
    for numbers, learning_rate in zip(batches, learning_rates, strict=True):
        nats, tokens = 0.0, 0
        for number in numbers:  # one row at a time: no padding, no masks but the answer's
            ids, first_answer_token = _encode(tokenizer, records[number])
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            log_probabilities = logits.float().log_softmax(-1)
            for position in range(first_answer_token, len(ids)):
                nats = nats - log_probabilities[position - 1, ids[position]]
                tokens += 1
        (nats / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(nats.detach() / tokens))
    return losses


def _encode(tokenizer, record: dict) -> tuple[list[int], int]:
    question = {"role": "user", "content": f"{record['instruction']}\n\n{record['input']}"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    answer = {"role": "assistant", "content": record["output"]}
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert whole.startswith(prompt)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    return ids, len(prompt_ids)


def read(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
