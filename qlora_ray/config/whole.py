"""All sections together, and what only two of them can decide."""

from collections.abc import Sequence

from pydantic import model_validator

from qlora_ray.config.data import DataConfig
from qlora_ray.config.model import ModelConfig, QuantizationConfig
from qlora_ray.config.section import Section
from qlora_ray.config.sweep import SweepConfig
from qlora_ray.config.training import OF_PAIRS, TrainingConfig
from qlora_ray.config.upkeep import CheckpointConfig, EvaluationConfig, LoggingConfig, WatchdogConfig
from qlora_ray.config.workers import DeepSpeedConfig, RayConfig


class Config(Section):
    """One run, as asked for."""

    model: ModelConfig = ModelConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    ray: RayConfig = RayConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig | None = None
    """Only for python -m qlora_ray.tune: which settings vary, and what decides between the trials."""

    @property
    def starts_as_reference(self) -> bool:
        """Whether the reference is the adapter that the run is started from, and not the base."""
        asked = self.training.reference
        return self.training.has_reference and (asked == "start" or (asked == "auto" and bool(self.model.start_from)))

    @model_validator(mode="after")
    def _objective_fits(self):
        training, data = self.training, self.data
        if training.reference == "start" and not self.model.start_from:
            raise ValueError("training.reference=start: there is no model.start_from. Name an adapter, or use base.")
        decides = training.metric_for_best_model
        if self.sweep and self.sweep.metric in OF_PAIRS and self.sweep.metric != decides:
            raise ValueError(
                f"sweep.metric={self.sweep.metric}: each trial keeps its best adapter by "
                f"training.metric_for_best_model={decides}. Set both to the same."
            )
        if training.objective == "kto" and decides == "eval_rewards/accuracies":  # nor can sweep.metric be
            raise ValueError(
                f"training.metric_for_best_model={decides}: training.objective=kto compares no two answers of "
                "one prompt. Use eval_rewards/margins."
            )
        if not training.prefers:
            return self
        which = f"training.objective={training.objective} compares the answers of pairs"
        if self.sweep and self.sweep.metric == "eval_perplexity":
            raise ValueError(f"sweep.metric=eval_perplexity: {which}, which has none. Use eval_loss.")
        if data.train_on == "everything":
            raise ValueError(f"data.train_on=everything: {which}. Leave it out.")
        if data.keep_thoughts == "all":
            raise ValueError(f"data.keep_thoughts=all: makes several samples of a conversation, and {which}.")
        if data.format == "text":
            raise ValueError(f"data.format=text: {which}. Bring records with chosen and rejected.")
        return self

    @model_validator(mode="after")
    def _rows_can_be_shared(self):
        training, size = self.training, self.training.sequence_parallel
        ends = (self.ray.min_workers, self.ray.max_workers)
        if size == 1:
            return self
        key = f"training.sequence_parallel={size}"
        if any(end % size for end in ends):
            fits = [max(size, end // size * size) for end in ends]
            raise ValueError(
                f"{key}: {size} workers share each row, and ray.num_workers={_range(ends)} is not a multiple of it. "
                f"Use ray.num_workers={_range(fits)}."
            )
        if training.prefers:
            raise ValueError(
                f"{key}: training.objective={training.objective} compares whole answers, of which each worker would "
                "have a part. Use 1."
            )
        if training.neftune_noise_alpha:
            raise ValueError(
                f"{key}: training.neftune_noise_alpha={training.neftune_noise_alpha:g} draws the noise of a whole row "
                "at once. Set it to 0, or sequence_parallel to 1."
            )
        return self

    @property
    def num_row_groups(self) -> int:
        """Groups of workers at most, each of which computes rows of its own."""
        return self.ray.max_workers // self.training.sequence_parallel

    @model_validator(mode="after")
    def _lora_variant_fits(self):
        if self.model.lora_variant == "loftq" and self.quantization.type == "none":
            raise ValueError("model.lora_variant=loftq: starts from the quantization error; quantization.type is none.")
        return self


def _range(ends: Sequence[int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"[{ends[0]},{ends[1]}]"
