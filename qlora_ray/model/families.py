"""How the decoder layers of each fused model type are built, as data. A new family is an entry here. No torch.

A layer is x1 = x + m post1(attention(pre1(x))), y = x1 + m post2(mlp(pre2(x1))), with norms that a family may lack.
What its modules say themselves (bias, head size, scale of attention, window, activation, multipliers) is read there.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What differs from Llama; names are those of transformers' modules."""

    layer: str  # class of the decoder layer
    before: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")  # of attention and MLP; "" is none
    after: tuple[str, str] = ("", "")
    plus_one: bool = False  # the norms' gain is 1 + weight
    rounds_first: bool = True  # a norm rounds to the compute dtype before its gain, or after it
    norm_of_heads: str = ""  # of queries and keys: each head for itself, or the whole width; "" is none
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    halves_angles: bool = False  # cos and sin come with each value once
    interleaved: bool = False  # which values are rotated together: neighbours, or those half a head apart

    @property
    def num_norms_after(self) -> int:
        """Norms of what attention and MLP give."""
        return sum(map(bool, self.after))


FAMILIES = {
    "llama": Family("LlamaDecoderLayer"),
    "mistral": Family("MistralDecoderLayer"),
    "ministral": Family("MinistralDecoderLayer"),
    "qwen2": Family("Qwen2DecoderLayer"),
    "qwen3": Family("Qwen3DecoderLayer", norm_of_heads="head"),
    "smollm3": Family("SmolLM3DecoderLayer"),
    "granite": Family("GraniteDecoderLayer"),
    "phi3": Family("Phi3DecoderLayer", qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "glm4": Family(
        "Glm4DecoderLayer", after=("post_self_attn_layernorm", "post_mlp_layernorm"), gate_up=("gate_up_proj",),
        interleaved=True,
    ),
    "olmo2": Family(
        "Olmo2DecoderLayer", before=("", ""), after=("post_attention_layernorm", "post_feedforward_layernorm"),
        rounds_first=False, norm_of_heads="width",
    ),
    "gemma": Family("GemmaDecoderLayer", plus_one=True, rounds_first=False),
    "gemma3_text": Family(
        "Gemma3DecoderLayer", before=("input_layernorm", "pre_feedforward_layernorm"),
        after=("post_attention_layernorm", "post_feedforward_layernorm"), plus_one=True, rounds_first=False,
        norm_of_heads="head",
    ),
    "mixtral": Family("MixtralDecoderLayer"),
    "qwen2_moe": Family("Qwen2MoeDecoderLayer"),
    "qwen3_moe": Family("Qwen3MoeDecoderLayer", norm_of_heads="head"),
    "glm4_moe": Family("Glm4MoeDecoderLayer", norm_of_heads="head"),
    "gpt_oss": Family("GptOssDecoderLayer", rounds_first=False, halves_angles=True),
}  # fmt: skip

# Types whose decoder layers are not fused, and whose logits are what their head returns, or that over logits_scaling.
PLAIN_HEADS = {
    "olmoe", "granitemoe", "deepseek_v2", "deepseek_v3",
}  # fmt: skip
