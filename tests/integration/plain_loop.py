"""The same training without Ray and DeepSpeed: one process, PyTorch and PEFT, the loss written out by hand."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Place:
    """Weights and AdamW's moments by parameter name, after `step` steps."""

    step: int
    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]


def load(base: str, lora: dict, seed: int) -> PeftModel:
    """The 4-bit base with a LoRA, as PEFT's documentation has it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)).train()


def trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def start(model: PeftModel) -> Place:
    """Where a run with this seed begins."""
    weights = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    return Place(0, weights, {name: {key: torch.zeros_like(w) for key in MOMENTS} for name, w in weights.items()})


def step(model: PeftModel, place: Place, loss: torch.Tensor, learning_rate: float, max_norm: float) -> Place:
    """Where one step of torch's AdamW leads from here; the model has the weights of `place`."""
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    for name, parameter in parameters.items():
        moments = {key: value.clone() for key, value in place.moments[name].items()}
        optimizer.state[parameter] = {"step": torch.tensor(float(place.step)), **moments}
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moments = {name: {key: optimizer.state[p][key] for key in MOMENTS} for name, p in parameters.items()}
    return Place(place.step + 1, weights, moments)


def follow(
    base: str, records: list[dict], batches: list[list[int]], model: PeftModel, places: list[Place]
) -> Iterator[torch.Tensor]:
    """The loss (nats per answer token) of each batch of record numbers, at the weights of each place."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    for numbers, place in zip(batches, places, strict=True):
        for name, parameter in trained(model).items():
            parameter.data.copy_(place.weights[name])
        nats, tokens = torch.zeros(()), 0
        for number in numbers:  # one row at a time: no padding, no masks but the answer's
            ids, first_answer_token = _encode(tokenizer, records[number])
            log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            for position in range(first_answer_token, len(ids)):
                nats = nats - log_probabilities[position - 1, ids[position]]
                tokens += 1
        yield nats / tokens


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
