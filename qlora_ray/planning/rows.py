"""What a row holds, how long it may be, and how many rows a step reads."""

from qlora_ray.config import Config
from qlora_ray.data.stats import DataStats, Layout
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import BaseFacts
from qlora_ray.planning.sharing import PAD_TO_MULTIPLE_OF

# Model types whose attention stays within each sample of a packed row when position_ids restart there: logits and
# gradients are those of the samples alone (tests/integration/test_packing.py). Others get padded rows.
PACKED_MODEL_TYPES = {
    "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3",
    "gpt2", "gpt_neox", "olmo2", "granite", "glm4", "smollm3",
}  # fmt: skip


def layout(config: Config, base: BaseFacts) -> Layout:
    """What a row holds: several samples, and both answers of a pair, where asked for and attention keeps them apart."""
    training = config.training
    can = keeps_apart(config, base)
    return Layout(training.packing and can, training.records == "pairs" and training.share_prompts and can)


def keeps_apart(config: Config, base: BaseFacts) -> bool:
    """Whether attention keeps the samples of a row apart, so that a row may hold several."""
    return base.model_type in PACKED_MODEL_TYPES and not rope_depends_on_rows(config, base)


def rope_depends_on_rows(config: Config, base: BaseFacts) -> bool:
    """Whether rows may be so long that RoPE changes with what else a row holds."""
    return base.rope_limit is not None and config.training.max_length > base.rope_limit.num_tokens


def refuse_positions(config: Config, base: BaseFacts, data: DataStats) -> None:
    """Refuse rows that the base has no positions for, or of which a batch is not the sum of its samples.

    Raises ConfigError.
    """
    training, limit = config.training, base.rope_limit
    width = -(-data.longest_sample // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
    if base.num_positions and width > base.num_positions:
        one = "sample" if data.shares_prompts else "row"
        fits = base.num_positions // PAD_TO_MULTIPLE_OF * PAD_TO_MULTIPLE_OF
        raise ConfigError(
            f"training.max_length={training.max_length}: the longest {one} has {data.longest_sample:,} tokens, and the "
            f"base has learned {base.num_positions:,} positions. Use training.max_length={fits}."
        )
    if limit is None or data.longest_sample <= limit.num_tokens:
        return
    why = (
        f"rows of up to {data.longest_sample:,} tokens, and the base's RoPE ({limit.kind}) changes with the longest "
        f"row beyond {limit.num_tokens:,}"
    )
    if limit.kind == "dynamic":
        raise ConfigError(
            f"training.max_length={training.max_length}: {why}, of those before it too: a resumed run would not "
            f"have its bits. Use training.max_length={limit.num_tokens}."
        )
    if training.batch_size > 1:
        raise ConfigError(
            f"training.batch_size={training.batch_size}: {why}: a long row would change the others of its batch. Use "
            f"training.batch_size=1 with more gradient_accumulation_steps, or training.max_length={limit.num_tokens}."
        )


def accumulation_of(config: Config) -> int:
    """Forward passes per optimizer step of each worker. Raises ConfigError where the global batch cannot be split."""
    training, n = config.training, config.num_row_groups
    if training.global_batch_size is None:
        return training.gradient_accumulation_steps
    each = training.batch_size * n
    if training.global_batch_size % each == 0:
        return training.global_batch_size // each
    works = [
        size for size in range(1, training.global_batch_size // n + 1) if training.global_batch_size % (size * n) == 0
    ]
    nearest = sorted(sorted(works, key=lambda size: abs(size - training.batch_size))[:2])
    way_out = f"Nearest that work: {', '.join(map(str, nearest))}." if nearest else f"Use a multiple of {n} rows."
    groups = "ray.num_workers" + (" / training.sequence_parallel" if training.sequence_parallel > 1 else "")
    raise ConfigError(
        f"training.batch_size={training.batch_size}: the global batch of {training.global_batch_size} is not a "
        f"multiple of batch_size x {groups} = {training.batch_size} x {n}. {way_out}"
    )
