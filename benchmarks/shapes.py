"""Shapes of models that people train, and how fast matrix products alone would let them be."""

SHAPES = {
    "llama-8b": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "llama-70b": dict(model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                      num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "qwen2.5-32b": dict(model_type="qwen2", hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                        num_attention_heads=40, num_key_value_heads=8, vocab_size=152064, rope_theta=1e6),
    "mistral-7b": dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, vocab_size=32768, rope_theta=1e6,
                       sliding_window=None),
    "qwen2.5-7b": dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, rope_theta=1e6),
    "qwen3-8b": dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936, rope_theta=1e6),
    "gemma3-4b": dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
                      num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=262208,
                      sliding_window=1024),
    "phi-4-mini": dict(model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                       num_attention_heads=24, num_key_value_heads=8, vocab_size=200064, partial_rotary_factor=0.75),
    "granite-3-8b": dict(model_type="granite", hidden_size=4096, intermediate_size=12800, num_hidden_layers=40,
                         num_attention_heads=32, num_key_value_heads=8, vocab_size=49155, residual_multiplier=0.22,
                         attention_multiplier=0.0078125, embedding_multiplier=12.0, logits_scaling=16.0),
    "olmo2-7b": dict(model_type="olmo2", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=32, vocab_size=100352),
    "smollm3-3b": dict(model_type="smollm3", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                       num_attention_heads=16, num_key_value_heads=4, vocab_size=128256),
    "glm4-9b": dict(model_type="glm4", hidden_size=4096, intermediate_size=13696, num_hidden_layers=40,
                    num_attention_heads=32, num_key_value_heads=2, head_dim=128, vocab_size=151552),
    "qwen3-30b-a3b": dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
                          num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
                          rope_theta=1e6, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
                          norm_topk_prob=True),
    "mixtral-8x7b": dict(model_type="mixtral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, rope_theta=1e6,
                         num_local_experts=8, num_experts_per_tok=2),
    "gpt-oss-20b": dict(model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
                        num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088,
                        num_local_experts=32, num_experts_per_tok=4),
    "tiny-moe": dict(model_type="qwen3_moe", hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=2048, num_experts=8,
                     num_experts_per_tok=2, moe_intermediate_size=64),
    "gpt2-medium": dict(model_type="gpt2", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                        num_attention_heads=16, num_key_value_heads=16, vocab_size=50257),
    "tiny": dict(model_type="llama", hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, vocab_size=2048),
}  # fmt: skip
PEAK_FLOPS = 795e12  # bf16 matrix products measured on an H200 (8192 x 8192 x 8192, random data)
LEARNING_RATE, SEED, RANK = 2e-4, 0, 16


def shape_of(name: str, num_layers: int | None) -> dict:
    """A shape, with as many of its layers as are asked for."""
    return {**SHAPES[name], **({"num_hidden_layers": num_layers} if num_layers else {})}


def floor_tokens_per_second(shape: dict, length: int, rank: int = RANK) -> float:
    """Tokens a second if matrix products alone took time, at PEAK_FLOPS, nothing recomputed."""
    hidden, heads, kv = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape.get("head_dim", hidden // heads)
    sides = [(hidden, heads * head_dim), (hidden, kv * head_dim), (hidden, kv * head_dim), (heads * head_dim, hidden)]
    inner = shape.get("moe_intermediate_size", shape["intermediate_size"]) * shape.get("num_experts_per_tok", 1)
    lora = shape["num_hidden_layers"] * sum(rank * (a + b) for a, b in sides)  # experts get none
    sides += [(hidden, inner)] * (2 if shape["model_type"] == "gpt2" else 3)  # without a gate
    layers = shape["num_hidden_layers"]
    frozen = layers * sum(a * b for a, b in sides) + hidden * shape["vocab_size"]
    if "num_experts_per_tok" not in shape:
        lora = layers * sum(rank * (a + b) for a, b in sides)
    attention = layers * 2 * length * heads * head_dim * 3.5  # causal; backward computes the scores again
    return PEAK_FLOPS / (4 * frozen + 6 * lora + attention)
