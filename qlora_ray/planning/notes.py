"""What a user should know of a plan, in sentences."""

from qlora_ray.config import Config
from qlora_ray.data.stats import DataStats
from qlora_ray.model.facts import BaseFacts, left_out_of_all_linear
from qlora_ray.planning.rows import keeps_apart, rope_depends_on_rows
from qlora_ray.planning.speed import speed_notes

FEW_STEPS = 10  # an epoch of fewer is worth a word


def notes_of(config: Config, base: BaseFacts, data: DataStats, steps_per_epoch: int, use_gpu: bool) -> tuple[str, ...]:
    """What the base and the data make of the config that the user may not expect."""
    notes, is_quantized, experts = [], config.quantization.type != "none", base.experts
    if experts and is_quantized and experts.num_packed < experts.num_parameters:
        share = (experts.num_parameters - experts.num_packed) / base.num_parameters
        notes.append(
            f"{share:.0%} of the base's weights are experts that stay 16-bit: those of {base.model_type} models do not "
            "compute as transformers' interface for experts has it, or lie in a folder whose other layers are 4-bit."
        )
    elif is_quantized and base.num_packed_parameters < 0.5 * base.num_parameters:
        share = 1 - base.num_packed_parameters / base.num_parameters
        notes.append(f"{share:.0%} of the base's weights are not linear layers (embeddings mostly): they stay 16-bit.")
    if base.is_packed:
        how = config.quantization
        notes.append(
            f"The base is stored in 4 bits, and trained on as it is: quantization.type={how.type}, "
            f"double_quant={str(how.double_quant).lower()}."
        )
    notes += _of_positions(config, base)
    if config.training.packing and rope_depends_on_rows(config, base):
        assert base.rope_limit is not None
        notes.append(
            f"Rows hold one sample each: beyond {base.rope_limit.num_tokens:,} tokens the base's RoPE "
            f"({base.rope_limit.kind}) depends on what else a row holds."
        )
    elif config.training.packing and not keeps_apart(config, base):
        notes.append(
            f"Rows are padded, not packed: that {base.model_type} models keep the samples of a row apart is not shown."
        )
    is_asked = config.training.records == "pairs" and config.training.share_prompts
    if is_asked and not keeps_apart(config, base):
        notes.append(
            "Each answer of a pair is read with a prompt of its own: the two cannot share a row, as is said above."
            if config.training.packing
            else f"Each answer of a pair is read with a prompt of its own: {base.model_type} models cannot share it."
        )
    left_out = left_out_of_all_linear(base.model_type)
    if left_out and config.model.target_modules == "all-linear":
        notes.append(
            f"all-linear leaves out {' and '.join(left_out)}, which PEFT does not adapt in {base.model_type} models."
        )
    if data.packed and steps_per_epoch < FEW_STEPS <= data.num_samples:
        each, steps = data.num_samples / data.num_rows, "1 step" if steps_per_epoch == 1 else f"{steps_per_epoch} steps"
        notes.append(
            f"Packed rows hold {each:.0f} samples each, so an epoch is only {steps}. "
            "For more and smaller ones lower training.max_length or batch_size, or set training.packing=false."
        )
    if use_gpu:
        notes += speed_notes(config, base)
    if use_gpu and not config.training.deterministic:
        notes.append(
            "GPU kernels may add in another order each time, so an interrupted run ends near the bits of one that was "
            "not, not at them. For the same bits, 1 to 6% slower: training.deterministic=true."
        )
    if data.num_truncated:
        limit = config.training.max_length
        notes.append(f"{data.num_truncated} of {data.num_records} records were cut to training.max_length={limit}.")
    notes += data.notes
    if data.num_rejected:
        notes.append(f"{data.num_rejected} of {data.num_records} records were rejected.")
    return tuple(notes)


def _of_positions(config: Config, base: BaseFacts) -> list[str]:
    """Of rows beyond the base's context, and of a RoPE that takes the place of its own."""
    notes, scaling, length = [], config.model.rope_scaling, config.training.max_length
    if scaling and base.own_rope:
        notes.append(f"model.rope_scaling={scaling['rope_type']} takes the place of the base's own ({base.own_rope}).")
    if not base.context_length or length <= base.context_length:
        return notes
    beyond = f"training.max_length={length} exceeds the base's context of {base.context_length}"
    if not base.takes_rope_scaling:
        return [*notes, f"{beyond}."]
    factor = -(-length // base.context_length)
    if scaling:
        reach = f"{scaling['factor'] * factor:g}"
        return [*notes, f"{beyond} with model.rope_scaling: a factor of {reach} reaches that far."]
    way_out = f"model.rope_scaling={{rope_type: yarn, factor: {factor}}}"
    return [*notes, f"{beyond}: it has not learned positions beyond it. To reach them: {way_out}."]
