"""Preference objectives against TRL's own trainers: ten steps on the same pairs from the same start, in float32.

Losses, rewards and LoRA gradients. TRL is in the extra "bench" alone: without it these are skipped.
"""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_ray.config import TrainingConfig
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.worker.loss import log_probabilities
from qlora_ray.worker.objectives import FIGURES, figures_of_labelled
from qlora_ray.worker.preference import Preference
from tests.integration import tiny_models

trl = pytest.importorskip("trl")

STEPS, RATE, BETA, NEAR = 10, 1e-3, 0.1, 1e-5
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


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


@dataclass(frozen=True)
class Side:
    """A model that is trained, and its optimizer."""

    model: Any
    optimizer: torch.optim.Optimizer

    def step(self, loss: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        """Takes a step; returns the loss and its gradient by each matrix of the LoRA."""
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [value.grad.clone() for value in weights_of(self.model).values()]
        self.optimizer.step()
        return float(loss.detach()), gradients


def side(model) -> Side:
    return Side(model, torch.optim.AdamW(weights_of(model).values(), lr=RATE))


def same(ours: tuple[float, list[torch.Tensor]], theirs: tuple[float, list[torch.Tensor]]) -> None:
    """Losses, and LoRA gradients: the length of their difference by that of the gradient, for each matrix."""
    assert ours[0] == pytest.approx(theirs[0], rel=NEAR, abs=NEAR)
    for made, exact in zip(ours[1], theirs[1], strict=True):
        assert float((made - exact).norm() / exact.norm()) < NEAR


PAIRS = [
    {"prompt": f"Say {i}:", "chosen": f" {i} it is" + " yes" * (i % 3), "rejected": " no" * (i % 4 + 1)}
    for i in range(24)
]


def trainer_of(objective: str, more: dict[str, float], arguments: dict[str, Any]):
    """TRL's trainer for an objective, and its settings."""
    if objective in ("dpo", "ipo"):
        from trl import DPOConfig, DPOTrainer

        loss_types = ["ipo" if objective == "ipo" else "sigmoid"] + ["sft"] * bool(more)
        weights = [1.0, more["rpo_alpha"]] if more else None
        return DPOTrainer, DPOConfig(loss_type=loss_types, loss_weights=weights, **arguments)
    if objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig(max_length=128, **arguments)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {"loss_type": "simpo", "cpo_alpha": 0.0} if objective == "simpo" else {"loss_type": "sigmoid"}
    return CPOTrainer, CPOConfig(max_length=128, **{**settings, **more, **arguments})


def of_answers_alone(trainer) -> None:
    """Makes TRL's ORPO take the chosen answer's own loss without that of its prompt, as in the paper."""
    forward = trainer.concatenated_forward

    def forward_of_answers(*given):
        made = forward(*given)
        return *made[:4], -made[0].mean(), *made[5:]

    trainer.concatenated_forward = forward_of_answers


def loss_and_figures(trainer, given: dict) -> tuple[torch.Tensor, dict[str, float]]:
    """What TRL makes of a batch of its own."""
    if hasattr(trainer, "get_batch_loss_metrics"):
        return trainer.get_batch_loss_metrics(trainer.model, given)
    loss = trainer._compute_loss(trainer.model, given, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def as_ours(given: dict) -> dict[str, torch.Tensor]:
    """TRL's batch of pairs as a worker has it."""
    if "input_ids" in given:
        return batch_of(given["input_ids"], given["completion_mask"])
    halves = [(given[f"{name}_input_ids"], given[f"{name}_labels"]) for name in ("chosen", "rejected")]
    width = max(ids.shape[1] for ids, _ in halves)
    ids = torch.cat([F.pad(ids, (0, width - ids.shape[1])) for ids, _ in halves])
    labels = torch.cat([F.pad(labels, (0, width - labels.shape[1]), value=IGNORE_INDEX) for _, labels in halves])
    return batch_of(ids, labels != IGNORE_INDEX)


@pytest.mark.parametrize(
    ("objective", "more", "pairs"),
    [
        ("dpo", {}, 2),
        ("ipo", {}, 2),
        ("dpo", {"rpo_alpha": 0.7}, 1),  # TRL's own SFT term is a mean over the tokens of a batch
        ("orpo", {}, 1),
        ("simpo", {"label_smoothing": 0.1, "simpo_gamma": 0.3}, 2),
        ("cpo", {"label_smoothing": 0.1, "cpo_alpha": 0.6}, 1),
    ],
)
def test_ten_steps_are_those_of_trls_trainer(objective, more, pairs, start, tmp_path):
    from datasets import Dataset

    model, tokenizer = start
    frozen = copy.deepcopy(model)
    arguments = dict(
        output_dir=str(tmp_path / "out"), beta=BETA, use_cpu=True, bf16=False, per_device_train_batch_size=pairs,
        report_to=[], gradient_checkpointing=False, disable_dropout=True, remove_unused_columns=False,
    )  # fmt: skip
    maker, settings = trainer_of(objective, more, arguments)
    data = Dataset.from_list(PAIRS)
    trainer = maker(model=copy.deepcopy(model), args=settings, train_dataset=data, processing_class=tokenizer)
    if objective == "orpo":
        of_answers_alone(trainer)
    ours, theirs = side(model), side(trainer.model)
    training = TrainingConfig.model_validate({"objective": objective, "beta": BETA, **more})
    for given in itertools.islice(trainer.get_train_dataloader(), STEPS):
        batch = as_ours(given)
        with torch.no_grad():
            reference = log_probabilities(frozen, batch)[0] if training.has_reference else None
        loss, figures = Preference(training, reference).sums(ours.model, batch)
        their_loss, logged = loss_and_figures(trainer, given)
        same(ours.step(loss / pairs), theirs.step(their_loss))
        found = {name: value / pairs for name, value in zip(FIGURES, figures.tolist(), strict=True)}
        assert {name: found[name] for name in REWARDS} == pytest.approx(
            {name: logged[name] for name in REWARDS}, rel=NEAR, abs=NEAR
        )


LABELLED = [
    {"prompt": f"Say {i}:", "completion": f" {i} it is" + " yes" * (i % 3), "label": i % 3 > 0} for i in range(24)
]


def test_ten_steps_are_those_of_trls_kto_trainer(start, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    model, tokenizer = start
    frozen = copy.deepcopy(model)
    settings = {"beta": BETA, "desirable_weight": 0.7, "undesirable_weight": 1.3}
    arguments = KTOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, per_device_train_batch_size=3, report_to=[],
        gradient_checkpointing=False, disable_dropout=True, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    data = Dataset.from_list(LABELLED)
    trainer = KTOTrainer(model=copy.deepcopy(model), args=arguments, train_dataset=data, processing_class=tokenizer)
    ours, theirs = side(model), side(trainer.model)
    training = TrainingConfig.model_validate({"objective": "kto", **settings})
    for given in itertools.islice(itertools.cycle(trainer.get_train_dataloader()), STEPS):
        answers, others = (batch_of(given[f"{name}input_ids"], given[f"{name}completion_mask"]) for name in ("", "KL_"))
        with torch.no_grad():
            reference, of_others = (log_probabilities(frozen, batch)[0] for batch in (answers, others))
            found = log_probabilities(ours.model, others)[0]
        kl = max(0.0, float((found - of_others).mean()))
        answers["is_desirable"] = torch.as_tensor(given["label"], dtype=torch.bool)
        loss, figures = Preference(training, reference, kl).sums(ours.model, answers)
        their_loss, logged = loss_and_figures(trainer, given)
        same(ours.step(loss / 3), theirs.step(their_loss))
        made = figures_of_labelled(figures.tolist(), 3)
        names = {*REWARDS[:3], "kl"} & made.keys()
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "kl"} == names
        assert {name: made[name] for name in names} == pytest.approx(
            {name: logged[name] for name in names}, rel=NEAR, abs=NEAR
        )
