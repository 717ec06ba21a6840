"""How much memory a run will take and how fast it will be, before it starts. No torch, no GPU."""

from dataclasses import dataclass

from qlora_ray.config import Config
from qlora_ray.model.facts import EXPERT_CHUNK_BYTES, BaseFacts
from qlora_ray.model.families import FAMILIES, PLAIN_HEADS
from qlora_ray.model.recompute import Choice, Keep, LayerShape, activation_bytes

GIB = 2**30
# 4 bits + one 8-bit scale per 64 weights (arXiv:2305.14314), or one float32 scale without double quantization.
BYTES_PER_WEIGHT = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
# bf16 matrix products, FLOP/s: H200 measured (8192^3, random data), the others their datasheets' dense rate x 0.8.
PRODUCT_FLOPS = {"H200": 795e12, "H100": 795e12, "A100": 250e12, "L40S": 290e12, "RTX-4090": 130e12}
BESIDE_LAYERS = {"lm_head", "embed_tokens", "model.norm"}  # trained whole, they leave decoder layers fused
SHARE_OF_FLOOR = 0.69  # of the products' time, measured on an H200: benchmarks/README.md


@dataclass(frozen=True)
class Sizes:
    """What the forecast depends on, besides the choice of what is kept."""

    base: BaseFacts
    num_trainable: int
    quantized: bool
    double_quant: bool
    element_bytes: int
    stage: int
    num_workers: int  # the fewest: each then holds most
    layer: LayerShape | None  # None: decoder layers are not fused
    trains_rows: bool  # of embedding and output layer: model.new_tokens
    has_whole_logits: bool  # the output layer is not fused with its loss


def sizes(config: Config, base: BaseFacts, num_trainable: int, stage: int, dtype: str) -> Sizes:
    """Collect them."""
    wide = 4 if dtype == "float32" else 2
    quantization = config.quantization
    return Sizes(
        base, num_trainable, quantization.type != "none", quantization.double_quant, wide, stage,
        config.ray.min_workers, layer_shape(config, base, wide), bool(config.model.new_tokens),
        bool(config.model.new_tokens) or "lm_head" in config.model.modules_to_save,
    )  # fmt: skip


def layer_shape(config: Config, base: BaseFacts, element_bytes: int) -> LayerShape | None:
    """Widths of the base's decoder layers, or None where they will not be fused."""
    model = config.model
    family = FAMILIES.get(base.model_type)
    if family is None or model.lora_variant == "dora" or config.quantization.type == "none":
        return None
    if set(model.modules_to_save) - BESIDE_LAYERS:
        return None
    first = {name.split(".")[-1]: (rows, columns) for name, rows, columns in base.linear_shapes if ".0." in name}
    if not {*family.qkv, "o_proj", *family.gate_up} <= first.keys():
        return None
    queries = first["o_proj"][1]
    return LayerShape(
        hidden=first["o_proj"][0], inner=sum(first[name][0] for name in family.gate_up) // 2, queries=queries,
        keys=(sum(first[name][0] for name in family.qkv) - queries) // 2,
        rank=max(model.lora_r, *model.rank_pattern.values(), 0),
        element_bytes=element_bytes, adapted=(len(family.qkv), 1, len(family.gate_up), 1),
        has_head_norms=bool(family.norm_of_heads), norms_after=family.num_norms_after,
    )  # fmt: skip


def resident_gib(sizes: Sizes) -> dict[str, float]:
    """GiB a worker holds all the time, by part."""
    base, wide = sizes.base, sizes.element_bytes
    quantized = base.num_packed_parameters if sizes.quantized else 0
    packed = quantized * 0.5
    scales = quantized * (BYTES_PER_WEIGHT[sizes.double_quant] - 0.5)  # ZeRO shards weights, not their scales
    rest = (base.num_parameters - quantized) * wide
    shards = sizes.num_workers if sizes.stage == 3 else 1
    shares = sizes.num_workers if sizes.stage > 0 else 1
    master = 4 if wide == 2 else 0
    # Weights and gradients; the float32 sum of gradients, and DeepSpeed's share of it; float32 copy and two moments.
    here = sizes.num_trainable * wide * 2
    ours = sizes.num_trainable * (4 / sizes.num_workers + (wide / shares if sizes.stage > 0 else 0))
    return {
        "base": ((packed + rest) / shards + scales) / GIB,
        "lora_and_optimizer": (here + ours + sizes.num_trainable * (8 + master) / shares) / GIB,
    }


def memory_gib(sizes: Sizes, num_tokens: int, choice: Choice | None, recompute_all: bool = False) -> dict[str, float]:
    """GiB of a worker by part, for micro-batches of so many tokens; their sum is the peak in training.

    `choice` is what fused layers keep; without it layers keep what autograd keeps, or with recompute_all their input.
    """
    base, wide = sizes.base, sizes.element_bytes
    if choice is not None and sizes.layer is not None:
        passing = activation_bytes(sizes.layer, choice, num_tokens, base.vocab_size)
        if sizes.has_whole_logits:
            passing += num_tokens * base.vocab_size * (wide + 8)
    else:
        per_token = sum(rows + 2 * columns for _, rows, columns in base.linear_shapes) / max(1, base.num_layers)
        layers_kept = 1 if recompute_all else base.num_layers
        kept = per_token * layers_kept + base.num_layers * base.hidden_size
        has_logits = sizes.has_whole_logits or base.model_type not in PLAIN_HEADS
        passing = int(num_tokens * (kept * wide + base.vocab_size * (wide + 8) * has_logits))
        passing += _bytes_in_experts(base, num_tokens, wide, recompute_all)
    if sizes.trains_rows:  # PEFT copies the embedding and the output layer, and their gradients are dense
        passing += 4 * base.vocab_size * base.hidden_size * wide
    quantized = base.num_packed_parameters if sizes.quantized else 0
    loaded = quantized * BYTES_PER_WEIGHT[sizes.double_quant] + (base.num_parameters - quantized) * wide
    return {**resident_gib(sizes), "activations": passing / GIB, "while_loading": loaded / GIB}


def _bytes_in_experts(base: BaseFacts, num_tokens: int, wide: int, recompute_all: bool) -> int:
    """Activations and dequantized weights of model/routed.py: first products are kept, the rest is of one layer."""
    experts = base.experts
    if experts is None:
        return 0
    rows, layers_kept = num_tokens * experts.num_per_token, 1 if recompute_all else experts.num_layers
    weights = min(EXPERT_CHUNK_BYTES, experts.num_experts * experts.up * experts.hidden * wide)
    return rows * wide * (layers_kept * experts.up + 2 * experts.inner + 3 * experts.hidden) + weights


def peak_gib(forecast: dict[str, float]) -> float:
    """Peak in training of a forecast by part."""
    return sum(value for name, value in forecast.items() if name != "while_loading")


def tokens_per_second(sizes: Sizes, length: int, choice: Choice | None, gpu: str) -> float | None:
    """Of one worker: what its products take, at the share of their rate reached. None where that is unknown.

    It is for mixtures of experts: nothing was measured of how fast these products are.
    """
    base, layer = sizes.base, sizes.layer
    if gpu not in PRODUCT_FLOPS or base.experts:
        return None
    head = base.hidden_size * base.vocab_size
    flops = 4.0 * (base.num_linear_parameters + head) + 6.0 * sizes.num_trainable
    flops += 7.0 * length * base.num_layers * (layer.queries if layer else base.hidden_size)
    if choice is not None and layer is not None:
        flops += sum(layer.repeated_flops(level, length) for level in choice.levels)
    elif choice is None:
        flops += 2.0 * base.num_linear_parameters
    return SHARE_OF_FLOOR * PRODUCT_FLOPS[gpu] / flops


def all_layers(sizes: Sizes, level: Keep) -> Choice:
    """The same level for every layer."""
    return Choice((level,) * sizes.base.num_layers)
