"""How much memory a run will take and how fast it will be, before it starts. No torch, no GPU."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from qlora_ray.config import Config
from qlora_ray.model.facts import EXPERT_CHUNK_BYTES, BaseFacts
from qlora_ray.model.families import FAMILIES, PLAIN_HEADS
from qlora_ray.model.recompute import Choice, Keep, LayerShape, PlainShape, RoutedShape, activation_bytes, host_bytes

GIB = 2**30
SHARE_OF_MEMORY = 0.93  # of a GPU's; the rest is the CUDA context and the allocator's
NUM_SLOTS = 3  # of model/ring.py
# cuBLAS has room of its own for each thread, that of forward and that of backward: on Hopper and later 32 MiB, on older
# GPUs a quarter (torch 2.13, aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_BYTES = 2 * 2**25
# 4 bits + one 8-bit scale per 64 weights (arXiv:2305.14314), or one float32 scale without double quantization.
BYTES_PER_WEIGHT = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
# bf16 matrix products, FLOP/s: H200 measured (8192^3, random data), the others their datasheets' dense rate x 0.8.
PRODUCT_FLOPS = {"H200": 795e12, "H100": 795e12, "A100": 250e12, "L40S": 290e12, "RTX-4090": 130e12}
BESIDE_LAYERS = {"lm_head", "embed_tokens", "model.norm", "ln_f"}  # trained whole, they leave decoder layers fused
SHARE_OF_FLOOR = 0.69  # of the products' time, measured on an H200: benchmarks/README.md
SHARE_OF_FLOOR_NOT_FUSED = 0.42  # the same where projections alone are fused: a Qwen3-8B shape on an H100, all again
LAUNCH_SECONDS = 2e-3  # products of a layer that take less wait for the host: a gpt2-medium layer took 7 ms, not 0.2
# Of mixtures, whose layers move much beside their products. Products: 351 of a step's 456 ms on an H200, attention 44
# (benchmarks/README.md); bytes: three quarters of the datasheets' rates. Qwen3-30B-A3B, gpt-oss-20b and Mixtral-8x7B
# shapes on an H100 were within 8% of what these three tell.
SHARE_OF_PRODUCTS, SHARE_OF_ATTENTION, SHARE_OF_BYTES = 0.9, 0.44, 0.75
BYTES_PER_SECOND = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "L40S": 0.864e12, "RTX-4090": 1.008e12}
SAME_INPUT = re.compile(r"(^|\.)(q|k|v|gate|up)_proj$")  # of layers that read one tensor, and no name says so else


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
    layer: LayerShape | PlainShape
    trains_rows: bool  # of embedding and output layer: model.new_tokens
    begins_whole: bool  # the adapter is made of whole weights, before ZeRO takes them apart
    shares_base: bool  # over the workers; else each holds all of it
    offload: str  # none, or where the layers' weights lie: cpu, nvme
    num_of_node: int | None = None  # workers that share the base, where those of each node do; None: all do
    use_gpu: bool = True

    @property
    def loads_in_shares(self) -> bool:
        """Whether each worker reads and packs its share of the base alone."""
        return self.shares_base and not self.begins_whole

    @property
    def num_sharing(self) -> int:
        """Workers that hold the base together."""
        return (self.num_of_node or self.num_workers) if self.shares_base else 1

    def of_rows(self, num_tokens: int) -> "Sizes":
        """The same for rows of at most so many tokens."""
        return replace(self, layer=self.layer.of_rows(num_tokens))


def sizes(config: Config, base: BaseFacts, num_trainable: int, stage: int, dtype: str) -> Sizes:
    """Collect them."""
    wide = 4 if dtype == "float32" else 2
    quantization = config.quantization
    return Sizes(
        base, num_trainable, quantization.type != "none", quantization.double_quant, wide, stage,
        config.ray.min_workers, layer_shape(config, base, wide), bool(config.model.new_tokens),
        begins_whole(config),
        stage == 3 and config.ray.max_workers > 1 and config.deepspeed.share_base != "replicate"
        and config.deepspeed.offload_params == "none",
        config.deepspeed.offload_params,
    ).of_rows(config.training.max_length // config.training.sequence_parallel)  # fmt: skip


def begins_whole(config: Config) -> bool:
    """Whether the adapter is made of whole weights, as LoftQ and DoRA do: before ZeRO takes the base apart."""
    return config.model.lora_variant not in ("lora", "rslora")


def layer_shape(config: Config, base: BaseFacts, element_bytes: int) -> LayerShape | PlainShape:
    """Widths of the base's decoder layers, as they will be: fused or not."""
    model = config.model
    family = FAMILIES.get(base.model_type)
    rank = max(model.lora_r, *model.rank_pattern.values(), 0)
    widths = {  # of outputs, or of what o_proj reads: a weight may be stored either way round
        name.partition(".0.")[2]: rows * columns // max(1, base.hidden_size)
        for name, rows, columns in base.linear_shapes if ".0." in name
    }  # fmt: skip
    has_whole_logits = bool(model.new_tokens) or "lm_head" in model.modules_to_save
    can_fuse = config.quantization.type != "none" and not (model.lora_variant == "dora" and model.lora_dropout)
    can_fuse = can_fuse and not set(model.modules_to_save) - BESIDE_LAYERS
    can_fuse = can_fuse and not (base.experts and not base.experts.num_packed)
    groups = () if family is None else family.projections[:2] if base.experts else family.projections
    if family is None or not can_fuse or not {name for names in groups for name in names} <= widths.keys():
        return _plain_shape(base, rank, element_bytes, has_whole_logits)
    qkv, queries, *of_mlp = (sum(widths[name] for name in names) for names in groups)
    parts, key_heads = config.training.sequence_parallel, base.num_key_heads or 1
    shape: dict[str, Any] = dict(
        hidden=base.hidden_size, queries=queries, keys=(qkv - queries) // 2, drops=any(family.drops),
        rank=rank, element_bytes=element_bytes, has_head_norms=bool(family.norm_of_heads),
        norms_after=family.num_norms_after, is_dora=model.lora_variant == "dora", has_whole_logits=has_whole_logits,
        row_parts=parts, key_copies=math.lcm(key_heads, parts) // key_heads,
    )  # fmt: skip
    if base.experts:
        shared = [rows for name, rows, _ in base.linear_shapes if "shared_expert" in name and name.endswith("up_proj")]
        sizes = base.experts
        return RoutedShape(
            inner=max(shared, default=0), adapted=(len(family.qkv), 1, 0, 0), num_experts=sizes.num_experts,
            num_per_token=sizes.num_per_token, up=sizes.up, expert_inner=sizes.inner, has_bias=sizes.has_bias,
            adapts_experts=model.expert_lora, **shape,
        )  # fmt: skip
    up, inner = of_mlp
    return LayerShape(inner=inner, has_gate=up > inner, adapted=(len(family.qkv), 1, len(family.gate_up), 1), **shape)


def _plain_shape(base: BaseFacts, rank: int, element_bytes: int, has_whole_logits: bool) -> PlainShape:
    """What autograd keeps of a layer by its projections: what each reads, once, what each gives, and its LoRA's share.

    What one gives to the residual stream is not kept, but a norm keeps as much there.
    """
    layers = max(1, base.num_layers)
    elements, read = 0, set()
    for name, rows, columns in base.linear_shapes:
        place = name.rpartition(".")[0] if SAME_INPUT.search(name) else name
        elements += rows + rank + (0 if place in read else columns)
        read.add(place)
    widest = max((max(rows, columns) for _, rows, columns in base.linear_shapes), default=base.hidden_size)
    dequantized, experts = 0, base.experts
    if experts:  # model/routed.py keeps the first products; the others, and what is around them, are of one layer
        elements += experts.num_layers * experts.num_per_token * experts.up
        widest = max(widest, experts.num_per_token * (2 * experts.inner + 3 * experts.hidden) // 2)
        dequantized = min(EXPERT_CHUNK_BYTES, experts.num_experts * experts.up * experts.hidden * element_bytes)
    return PlainShape(
        base.hidden_size, elements * element_bytes // layers, base.num_linear_parameters // layers, widest,
        element_bytes, base.model_type not in PLAIN_HEADS or has_whole_logits, dequantized,
    )  # fmt: skip


def passing_bytes(sizes: Sizes) -> float:
    """Bytes of the layers' weights, which pass through slots of the GPU where they are offloaded."""
    base = sizes.base
    if sizes.quantized:
        return base.num_packed_parameters * BYTES_PER_WEIGHT[sizes.double_quant]
    return base.num_linear_parameters * sizes.element_bytes


def slab_bytes(sizes: Sizes) -> float:
    """Of one layer."""
    return passing_bytes(sizes) / max(1, sizes.base.num_layers)


def gathered_bytes(sizes: Sizes) -> float:
    """Of what other workers hold of the base, what a worker has beside its own share, where they share it."""
    base, others = sizes.base, 1 - 1 / sizes.num_sharing
    if not others:
        return 0.0
    end = base.vocab_size * base.hidden_size * sizes.element_bytes  # ZeRO-3 brings embedding or output layer beforehand
    if isinstance(sizes.layer, LayerShape):  # model/ring.py
        return end + min(NUM_SLOTS, base.num_layers) * slab_bytes(sizes)
    scales = base.num_packed_parameters * (BYTES_PER_WEIGHT[sizes.double_quant] - 0.5) if sizes.quantized else 0
    return end + scales * others  # ZeRO-3 shards weights, not their scales


def resident_gib(sizes: Sizes) -> dict[str, float]:
    """GiB a worker holds all the time, by part."""
    base, wide = sizes.base, sizes.element_bytes
    quantized = base.num_packed_parameters if sizes.quantized else 0
    packed = quantized * BYTES_PER_WEIGHT[sizes.double_quant]  # with scales
    rest = (base.num_parameters - quantized) * wide
    shares = sizes.num_workers if sizes.stage > 0 else 1
    master = 4 if wide == 2 else 0
    # Weights and gradients; the float32 sum of gradients, and DeepSpeed's share of it; float32 copy and two moments.
    here = sizes.num_trainable * wide * 2
    ours = sizes.num_trainable * (4 / sizes.num_workers + (wide / shares if sizes.stage > 0 else 0))
    held = (packed + rest) / sizes.num_sharing + gathered_bytes(sizes)
    if sizes.offload != "none":
        held = packed + rest - passing_bytes(sizes) + NUM_SLOTS * slab_bytes(sizes)
    return {
        "base": held / GIB,
        "lora_and_optimizer": (here + ours + sizes.num_trainable * (8 + master) / shares) / GIB,
        "libraries": CUBLAS_BYTES / GIB if sizes.use_gpu else 0.0,
    }


def memory_gib(sizes: Sizes, num_tokens: int, choice: Choice) -> dict[str, float]:
    """GiB of a worker by part, for micro-batches of so many tokens; their sum is the peak in training."""
    base, wide = sizes.base, sizes.element_bytes
    passing = activation_bytes(sizes.layer, choice, num_tokens, base.vocab_size)
    if sizes.trains_rows:  # PEFT copies the embedding and the output layer, and their gradients are dense
        passing += 4 * base.vocab_size * base.hidden_size * wide
    return {**resident_gib(sizes), "activations": passing / GIB, "while_loading": loading_gib(sizes)}


def loading_gib(sizes: Sizes) -> float:
    """GiB that a worker holds at most while it loads the base."""
    base, wide = sizes.base, sizes.element_bytes
    quantized = base.num_packed_parameters if sizes.quantized else 0
    if sizes.loads_in_shares or sizes.offload != "none":
        stack = (
            base.experts and max(base.experts.up, base.experts.inner) * base.experts.hidden * base.experts.num_experts
        )
        largest = max(stack or 0, *(rows * columns for _, rows, columns in base.linear_shapes), 0)
        share = 1 / sizes.num_sharing if sizes.loads_in_shares else 1.0
        one = largest * (wide * share + 2 * 4 / 64)  # its share, and float32 scales of all of it
        held = resident_gib(sizes)["base"] - gathered_bytes(sizes) / GIB  # what is gathered, is later
        return held + one / GIB
    return (quantized * BYTES_PER_WEIGHT[sizes.double_quant] + (base.num_parameters - quantized) * wide) / GIB


def host_gib(sizes: Sizes, num_tokens: int, choice: Choice) -> float:
    """GiB of host memory that a worker's layers park in."""
    return host_bytes(sizes.layer, choice, num_tokens) / GIB


def peak_gib(forecast: dict[str, float]) -> float:
    """Peak in training of a forecast by part."""
    return sum(value for name, value in forecast.items() if name != "while_loading")


def tokens_per_second(sizes: Sizes, num_tokens: int, length: int, choice: Choice, gpu: str) -> float | None:
    """Of one worker, for micro-batches of so many tokens: what their products take, at the share of their rate reached.

    None where that is unknown: of GPUs nobody has measured, of experts in 16 bits, and of small layers, which take the
    time of Python and launches, not that of products.
    """
    base, layer = sizes.base, sizes.layer
    if gpu not in PRODUCT_FLOPS or (base.experts and not isinstance(layer, RoutedShape)):
        return None
    head = base.hidden_size * base.vocab_size
    flops = 4.0 * (base.num_linear_parameters + head) + 6.0 * sizes.num_trainable
    flops += sum(layer.repeated_flops(level, length) for level in choice.levels)
    width, share = base.hidden_size, SHARE_OF_FLOOR_NOT_FUSED
    if isinstance(layer, LayerShape):
        width, share = layer.queries, SHARE_OF_FLOOR
    attention = 7.0 * length * base.num_layers * width
    seconds = num_tokens * (flops + attention) / PRODUCT_FLOPS[gpu] / share
    if base.experts and isinstance(layer, RoutedShape):
        flops += 4.0 * base.experts.num_active
        moved = sum(layer.moved_bytes(level, num_tokens) for level in choice.levels)
        seconds = num_tokens * (flops / SHARE_OF_PRODUCTS + attention / SHARE_OF_ATTENTION) / PRODUCT_FLOPS[gpu]
        seconds += moved / SHARE_OF_BYTES / BYTES_PER_SECOND[gpu]
    return num_tokens / seconds if seconds >= LAUNCH_SECONDS * base.num_layers else None


def all_layers(sizes: Sizes, level: Keep) -> Choice:
    """The same level for every layer."""
    return Choice((level,) * max(1, sizes.base.num_layers))
