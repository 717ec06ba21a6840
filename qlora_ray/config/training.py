"""Steps, objective, optimizer, rows: all that decides what is learnt."""

from typing import Literal

from pydantic import Field, model_validator

from qlora_ray.config.section import Section

# What each objective reads of training's settings of objectives; the others must be left as they are.
OBJECTIVES = {
    "sft": ("router_aux_loss_coef",),
    "dpo": ("beta", "label_smoothing", "rpo_alpha", "reference", "share_prompts"),
    "ipo": ("beta", "rpo_alpha", "reference", "share_prompts"),
    "kto": ("beta", "desirable_weight", "undesirable_weight", "reference"),
    "orpo": ("beta", "share_prompts"),
    "simpo": ("beta", "label_smoothing", "simpo_gamma", "rpo_alpha", "share_prompts"),
    "cpo": ("beta", "label_smoothing", "cpo_alpha", "share_prompts"),
}
# Figures of a validation of pairs that can decide between adapters: more is better.
OF_PAIRS = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_rewards/chosen", "eval_logps/chosen")
OF_OBJECTIVES = (
    "beta", "label_smoothing", "simpo_gamma", "rpo_alpha", "cpo_alpha", "desirable_weight", "undesirable_weight",
    "reference", "share_prompts", "router_aux_loss_coef",
)  # fmt: skip


class TrainingConfig(Section):
    """Steps, objective, optimizer, rows, and what is kept in memory."""

    objective: Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo"] = "sft"
    """sft: answers are learnt. kto: each answer is labelled as desirable or not. Others: of the two answers of a pair,
    chosen and rejected, one is preferred. See docs/preferences.md."""
    beta: float = Field(0.1, gt=0)
    """Strength of a preference (TRL `beta`); of orpo the weight of its odds ratio. simpo wants 2 to 10."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs whose answers may be the wrong way round: dpo, simpo, cpo."""
    simpo_gamma: float = Field(0.5, ge=0)
    """Margin that simpo wants between the answers' mean log-probabilities, times beta."""
    rpo_alpha: float = Field(0.0, ge=0)
    """Weight of the chosen answer's own loss, nats a token, beside dpo, ipo or simpo."""
    cpo_alpha: float = Field(1.0, ge=0)
    """The same of cpo."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of the desirable answers' losses in kto (TRL `desirable_weight`): raise it where they are fewer."""
    undesirable_weight: float = Field(1.0, gt=0)
    """The same of the undesirable ones."""
    reference: Literal["auto", "base", "start"] = "auto"
    """Whose log-probabilities dpo, ipo and kto measure from: the base's, or of the adapter in model.start_from. auto:
    start where there is one."""
    share_prompts: bool = True
    """Both answers of a pair lie in one row behind one copy of their prompt, where the base's attention can do that
    (the plan tells where not): the same losses with fewer tokens."""
    num_epochs: float = Field(3, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides num_epochs."""
    batch_size: int = Field(4, ge=1)
    """Rows per worker per forward pass. Lower this first on out-of-memory."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimizer step and worker."""
    global_batch_size: int | None = Field(None, ge=1)
    """Rows per optimizer step over all workers; replaces gradient_accumulation_steps."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warmup; cosine and linear end at 0."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0 turns clipping off."""
    loraplus_lr_ratio: float = Field(1.0, ge=1)
    """LoRA+ (arXiv:2402.12354): learning rate of the B matrices over that of the A matrices."""
    neftune_noise_alpha: float = Field(0.0, ge=0)
    """NEFTune (arXiv:2310.05914): strength of uniform noise on the input embeddings; 0 is off."""
    router_aux_loss_coef: float = Field(0.0, ge=0)
    """Mixtures of experts: weight of the load-balancing loss (arXiv:2101.03961), each layer's, as a mean; 0 is off.

    Pretraining had 0.001 to 0.02. metrics.jsonl tells of imbalance by busiest_expert_share.
    """
    max_length: int = Field(512, ge=8)
    """Tokens per row; longer records are cut."""
    sequence_parallel: int = Field(1, ge=1)
    """So many workers share each row, a part of its tokens each: for rows that one GPU has no room for. ray.num_workers
    is a multiple of it. See docs/speed.md."""
    packing: bool = True
    """Fill each row with several samples that do not see each other: no time goes into padding."""
    recompute: Literal["auto", "all", "none"] = "auto"
    """Compute activations again in backward instead of keeping them: less memory, more time. auto: keep what fits."""
    memory_budget_gib: float | None = Field(None, gt=0)
    """GPU memory that recompute=auto may fill, in GiB; default: nine tenths of what is free."""
    dequantized_weights: Literal["auto", "none"] = "auto"
    """What else fits under recompute=auto: the base's weights in 16 bits too, so that no step unpacks them."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides data order, LoRA initialization, dropout and noise."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Validate every so many steps; default: five times a run."""
    metric_for_best_model: Literal[
        "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_rewards/chosen", "eval_logps/chosen"
    ] = "eval_loss"
    """What decides which validation is the best: the lowest eval_loss, of the others (for pairs) the highest."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many validations in a row that were not better (metric_for_best_model)."""
    deterministic: bool = False
    """Only kernels that add in a fixed order, on GPUs too: the same bits each time, for some speed (docs/speed.md)."""
    max_skipped_steps: int = Field(5, ge=1)
    """A step whose gradient is not finite is skipped on all workers; after so many in a row the run ends."""

    @property
    def prefers(self) -> bool:
        """Whether answers are preferred to others, and not just learnt."""
        return self.objective != "sft"

    @property
    def records(self) -> Literal["answers", "pairs", "labels"]:
        """What records hold: answers to learn, pairs of a chosen and a rejected one, or answers with a label."""
        if self.objective == "sft":
            return "answers"
        return "labels" if self.objective == "kto" else "pairs"

    @property
    def has_reference(self) -> bool:
        """Whether the objective needs log-probabilities of another model than the one that is trained."""
        return "reference" in OBJECTIVES[self.objective]

    @model_validator(mode="after")
    def _settings_are_of_the_objective(self):
        for name in OF_OBJECTIVES:
            value = getattr(self, name)
            if name not in OBJECTIVES[self.objective] and value != type(self).model_fields[name].default:
                users = ", ".join(objective for objective, used in OBJECTIVES.items() if name in used)
                raise ValueError(
                    f"training.{name}={value}: training.objective={self.objective} does not use it ({users}). "
                    "Leave it out."
                )
        if self.metric_for_best_model in OF_PAIRS and not self.prefers:
            raise ValueError(
                f"training.metric_for_best_model={self.metric_for_best_model}: training.objective={self.objective} has "
                "no pairs. Use eval_loss."
            )
        return self
