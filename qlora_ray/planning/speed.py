"""What a setting costs in speed on a GPU, with the factor where one was measured: benchmarks/README.md."""

from qlora_ray.config import Config
from qlora_ray.model.facts import BaseFacts
from qlora_ray.model.families import FAMILIES
from qlora_ray.planning import memory

# Tokens per second of one H100, 4 rows of 2,048 tokens, through the door (benchmarks/README.md, "The whole path").
FUSED, WITH_DROPOUT = 16_708, 16_188  # Llama-3.1-8B shape
WITH_DORA, WITHOUT_DORA = 15_239, 16_498  # the same shape, benchmarks.throughput, stage 3
WITH_EXPERT_LORA, WITHOUT_EXPERT_LORA = 47_696, 59_117  # 12 layers of a Qwen3-30B-A3B shape, 4 rows of 4,096 tokens
LEFT_TO_PEFT = 5_063  # the same, every projection
PROJECTIONS_ALONE = 7_040  # Qwen3-8B shape


def speed_notes(config: Config, base: BaseFacts) -> list[str]:
    """A line for each setting that costs speed on a GPU."""
    model = config.model
    if config.quantization.type == "none":
        return ["quantization.type=none: nothing is fused; how much that costs was not measured."]
    if model.lora_variant == "dora" and model.lora_dropout:
        return [
            f"model.lora_dropout={model.lora_dropout:g} with model.lora_variant=dora: its layers are left to PEFT. "
            f"Plain LoRA that was left to PEFT ran at {LEFT_TO_PEFT / FUSED:.2f} of the speed of fused layers "
            "(Llama-3.1-8B shape, one H100); DoRA's own work comes on top. model.lora_dropout=0 is fused."
        ]
    if base.model_type not in FAMILIES:
        return [
            f"Decoder layers of {base.model_type} models are not fused, their projections are: a Qwen3-8B shape ran so "
            f"at {PROJECTIONS_ALONE / FUSED:.2f} of the speed of a fused Llama-3.1-8B shape (one H100, every layer "
            "computed again; training.recompute=auto keeps the layers that fit)."
        ]
    notes = []
    if set(model.modules_to_save) - memory.BESIDE_LAYERS:
        notes.append(
            "model.modules_to_save: decoder layers with a norm that is trained are not fused, their projections are; "
            "how much that costs was not measured."
        )
    elif model.lora_dropout:
        notes.append(
            f"model.lora_dropout={model.lora_dropout:g}: {WITH_DROPOUT / FUSED:.2f} of the speed of none "
            "(Llama-3.1-8B shape, one H100)."
        )
    if model.lora_variant == "dora":
        notes.append(
            f"model.lora_variant=dora: fused; {WITH_DORA / WITHOUT_DORA:.2f} of the speed of lora (Llama-3.1-8B shape, "
            "one H100)."
        )
    if model.expert_lora:
        notes.append(
            f"model.expert_lora: {WITH_EXPERT_LORA / WITHOUT_EXPERT_LORA:.2f} of the speed of none (12 layers of a "
            "Qwen3-30B-A3B shape, one H100)."
        )
    if model.new_tokens:
        notes.append(
            "model.new_tokens: the embedding is copied at each forward pass, and the output layer is not fused with "
            "its loss; how much that costs was not measured."
        )
    return notes
