"""Preference objectives against TRL's own trainers: ten steps on the same pairs from the same start, in float32.

TRL is in the extra "bench" alone: without it these are skipped.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_ray.config import TrainingConfig
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.worker.loss import log_probabilities
from qlora_ray.worker.objectives import FIGURES, figures_of_labelled
from qlora_ray.worker.preference import Preference
from tests.integration import tiny_models

trl = pytest.importorskip("trl")

STEPS, RATE, BETA = 10, 1e-2, 0.1
CPU = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def start(tmp_path):
    """A tiny base in float32 with a LoRA that changes what it says, and its tokenizer."""
    folder = tiny_models.save("llama", tmp_path / "base")
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def batch_of(input_ids: torch.Tensor, is_answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """TRL's batch, chosen rows before rejected ones, as a worker has it; the padding changes nothing."""
    predicts = torch.zeros_like(is_answer, dtype=torch.bool)
    predicts[:, :-1] = is_answer[:, 1:].bool()
    labels = input_ids.masked_fill(~is_answer.bool(), IGNORE_INDEX)
    order = torch.arange(len(input_ids))
    return {
        "input_ids": input_ids, "labels": labels, "label_places": predicts.flatten().nonzero().flatten(),
        "places": order, "label_counts": predicts.sum(1), "answer_order": order,
    }  # fmt: skip


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def step(model, optimizer, loss: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def same(model, other) -> None:
    ours, theirs = weights_of(model), weights_of(other)
    for name, value in ours.items():
        assert float((value - theirs[name]).detach().norm() / theirs[name].detach().norm()) < 1e-4, name


PAIRS = [
    {"prompt": f"Say {i}:", "chosen": f" {i} it is" + " yes" * (i % 3), "rejected": " no" * (i % 4 + 1)}
    for i in range(24)
]


@pytest.mark.parametrize(
    ("objective", "loss_types", "more"),
    [("dpo", ["sigmoid"], {}), ("ipo", ["ipo"], {}), ("dpo", ["sigmoid", "sft"], {"rpo_alpha": 0.7})],
)
def test_ten_steps_are_those_of_trls_dpo_trainer(objective, loss_types, more, start, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = start
    ours = copy.deepcopy(model)
    pairs = 1 if more else 2  # TRL's own SFT term is a mean over the tokens of a batch
    weights = [1.0, more["rpo_alpha"]] if more else None
    arguments = DPOConfig(
        output_dir=str(tmp_path / "out"), beta=BETA, loss_type=loss_types, loss_weights=weights, use_cpu=True,
        bf16=False, per_device_train_batch_size=pairs, report_to=[], gradient_checkpointing=False,
        disable_dropout=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    optimizers = [torch.optim.AdamW(weights_of(one).values(), lr=RATE) for one in (trainer.model, ours)]
    training = TrainingConfig.model_validate({"objective": objective, "beta": BETA, **more})
    frozen = copy.deepcopy(ours)
    for number, given in enumerate(trainer.get_train_dataloader()):
        if number == STEPS:
            break
        theirs = step(trainer.model, optimizers[0], trainer._compute_loss(trainer.model, given, return_outputs=False))
        batch = batch_of(given["input_ids"], given["completion_mask"])
        with torch.no_grad():
            reference, _ = log_probabilities(frozen, batch)
        loss, figures = Preference(training, reference).sums(ours, batch)
        assert step(ours, optimizers[1], loss / pairs) == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        logged = {name: trainer._metrics["train"][name][-1] for name in FIGURES if name in trainer._metrics["train"]}
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= logged.keys()
        found = {name: value / pairs for name, value in zip(FIGURES, figures.tolist(), strict=True)}
        assert {name: found[name] for name in logged} == pytest.approx(logged, rel=1e-4, abs=2e-5)
    same(ours, trainer.model)


def cpo_of(objective: str, training: TrainingConfig):
    """TRL's loss functions behind ORPO, SimPO and CPO, as its trainers are configured for them."""
    if objective == "orpo":
        from trl.experimental.orpo import ORPOTrainer as Trainer

        return Trainer, lambda c, r: -Trainer.odds_ratio_loss(SimpleNamespace(beta=BETA, accelerator=CPU), c, r)[0]
    from trl.experimental.cpo import CPOTrainer as Trainer

    asked = SimpleNamespace(
        alpha=0.0, beta=BETA, label_smoothing=training.label_smoothing, simpo_gamma=training.simpo_gamma,
        accelerator=CPU, loss_type="simpo" if objective == "simpo" else "sigmoid",
    )  # fmt: skip
    return Trainer, lambda c, r: Trainer.cpo_loss(asked, c, r)[0]


@pytest.mark.parametrize(
    ("objective", "more", "nll_weight"),
    [
        ("orpo", {}, 1.0),
        ("simpo", {"label_smoothing": 0.1}, 0.0),
        ("cpo", {"label_smoothing": 0.1, "cpo_alpha": 0.6}, 0.6),
    ],
)
def test_ten_steps_are_those_of_trls_loss_functions(objective, more, nll_weight, start):
    model, tokenizer = start
    ours = copy.deepcopy(model)
    training = TrainingConfig.model_validate({"objective": objective, "beta": BETA, **more})
    trainer, losses_of = cpo_of(objective, training)
    optimizers = [torch.optim.AdamW(weights_of(one).values(), lr=RATE) for one in (model, ours)]
    for number in range(STEPS):
        pairs = PAIRS[2 * number : 2 * number + 2]
        ids = [
            (tokenizer(pair["prompt"])["input_ids"], tokenizer(pair[which])["input_ids"])
            for which in ("chosen", "rejected")
            for pair in pairs
        ]
        width = max(len(prompt) + len(answer) for prompt, answer in ids)
        input_ids = torch.tensor([p + a + [0] * (width - len(p) - len(a)) for p, a in ids])
        is_answer = torch.tensor([[0] * len(p) + [1] * len(a) + [0] * (width - len(p) - len(a)) for p, a in ids])
        batch = batch_of(input_ids, is_answer)
        logits = model(input_ids=input_ids, use_cache=False).logits
        logps = trainer.get_batch_logps(logits, batch["labels"], average_log_prob=objective != "cpo")
        chosen, rejected = logps.chunk(2)
        # The mean nats a token of each chosen answer: ORPO's and CPO's papers, in batches of one also TRL's CPO.
        nll = -trainer.get_batch_logps(logits, batch["labels"], average_log_prob=True).chunk(2)[0]
        theirs = step(model, optimizers[0], (losses_of(chosen, rejected) + nll_weight * nll).mean())
        loss, _ = Preference(training, None).sums(ours, batch)
        assert step(ours, optimizers[1], loss / 2) == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    same(ours, model)


LABELLED = [
    {"prompt": f"Say {i}:", "completion": f" {i} it is" + " yes" * (i % 3), "label": i % 3 > 0} for i in range(24)
]


def test_ten_steps_are_those_of_trls_kto_trainer(start, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    model, tokenizer = start
    ours = copy.deepcopy(model)
    settings = {"beta": BETA, "desirable_weight": 0.7, "undesirable_weight": 1.3}
    arguments = KTOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, per_device_train_batch_size=3, report_to=[],
        gradient_checkpointing=False, disable_dropout=True, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer = KTOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(LABELLED), processing_class=tokenizer
    )
    optimizers = [torch.optim.AdamW(weights_of(one).values(), lr=RATE) for one in (trainer.model, ours)]
    training = TrainingConfig.model_validate({"objective": "kto", **settings})
    frozen = copy.deepcopy(ours)
    loader = list(trainer.get_train_dataloader())
    for number in range(STEPS):
        given = loader[number % len(loader)]
        theirs = step(trainer.model, optimizers[0], trainer._compute_loss(trainer.model, given, return_outputs=False))
        answers, others = (batch_of(given[f"{name}input_ids"], given[f"{name}completion_mask"]) for name in ("", "KL_"))
        with torch.no_grad():
            reference, of_others = (log_probabilities(frozen, batch)[0] for batch in (answers, others))
            found = log_probabilities(ours, others)[0]
        kl = max(0.0, float((found - of_others).mean()))
        answers["is_desirable"] = torch.as_tensor(given["label"], dtype=torch.bool)
        loss, figures = Preference(training, reference, kl).sums(ours, answers)
        assert step(ours, optimizers[1], loss / 3) == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        made = figures_of_labelled(figures.tolist(), 3)
        logged = {name: trainer._metrics["train"][name][-1] for name in made if name in trainer._metrics["train"]}
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "kl"} <= logged.keys()
        assert {name: made[name] for name in logged} == pytest.approx(logged, rel=1e-4, abs=2e-5)
    same(ours, trainer.model)
