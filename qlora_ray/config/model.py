"""The base, how it is stored, and the LoRA on it."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlora_ray.config import rope
from qlora_ray.config.section import Section

EMBEDDED_BASE = "embedded"


class ModelConfig(Section):
    """The base and the LoRA on it."""

    base_model: str = EMBEDDED_BASE
    """A local folder, a hub id, or "embedded": the small model inside this package. See docs/bases.md."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; with trust_remote_code the commit (40 digits), or of a folder the digest of
    its Python files, which the refusal without it prints."""
    start_from: str | None = Field(None, min_length=1)
    """An adapter to go on training instead of a new one: its folder, also one that plain PEFT wrote, or a run (its best
    adapter). It stays as it is. Rank, scale, layers and variant must be its own. See docs/use.md."""
    lora_r: int = Field(16, ge=1, le=1024)
    """Rank of the LoRA matrices (PEFT `r`). Raise it for harder skills; memory grows with it."""
    lora_alpha: float = Field(32, gt=0)
    """LoRA scale (PEFT `lora_alpha`): the update is multiplied by alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the LoRA input; 0 is a few percent faster."""
    target_modules: str | list[str] = "all-linear"
    """Which linear layers get a LoRA: "all-linear", a list of ends of their names, or a regular expression of the whole
    name. An entry that matches none is refused."""
    expert_lora: bool = False
    """Give every expert of a mixture a LoRA of its own, of rank lora_r / experts of a token (at least 1), scaled as the
    others are. Routers get none. See docs/bases.md."""
    exclude_modules: str | list[str] = []
    """Which of these get none after all, written in the same way (PEFT `exclude_modules`)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(default_factory=dict)
    """Another rank for some layers: ends of their names, or regular expressions of these, to ranks."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Another lora_alpha for some layers, named in the same way."""
    new_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Tokens to add to the tokenizer, e.g. ["<tool>"]: their rows of embedding and output layer are trained too. One
    that the tokenizer knows keeps its id. See docs/use.md."""
    modules_to_save: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Modules that are trained whole beside the LoRA, e.g. [norm, lm_head]: ends of their names (PEFT
    `modules_to_save`). Not those that are stored in 4 bits."""
    lora_variant: Literal["lora", "rslora", "dora", "loftq"] = "lora"
    """rslora scales by 1/sqrt(r); dora also learns magnitudes; loftq starts from the quantization error."""
    cache_quantized: Literal["auto"] | bool = False
    """Keep the base's 4-bit weights under `ray.storage_path`, where other runs, trials and resumptions read them and
    need not pack again. auto: where they take a GiB or more, and it is a folder with twice that free."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only with a pinned `revision`."""
    rope_scaling: dict[str, str | bool | int | float] | None = None
    """RoPE for rows longer than the base was trained on, as transformers' config has it: {rope_type: yarn, factor: 4},
    or linear, or llama3. It becomes part of the base's config, in training and wherever the adapter is used. See
    docs/bases.md."""
    factory: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """package.module:function that makes the model of its config, for one that transformers does not have."""

    @field_validator("base_model", "start_from")
    @classmethod
    def _folder_is_found_from_elsewhere(cls, name):
        # Ray's workers start in a folder of their own, and an adapter's record is read from anywhere.
        if name in (None, EMBEDDED_BASE) or not Path(name).expanduser().is_dir():
            return name
        return str(Path(name).expanduser().absolute())

    @field_validator("rope_scaling")
    @classmethod
    def _is_known_to_transformers(cls, scaling):
        return scaling and rope.checked(scaling)

    @field_validator("new_tokens")
    @classmethod
    def _is_no_token_twice(cls, tokens):
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} twice")
        blank = [token for token in tokens if token != token.strip()]
        if blank:
            raise ValueError(f"{blank[0]!r} begins or ends with white space, which tokenizers move about")
        return tokens

    @field_validator("lora_variant", mode="before")
    @classmethod
    def _is_not_pissa(cls, variant):
        if variant == "pissa":
            raise ValueError(
                "pissa rewrites the base weights, so its adapter would not fit the base that others load. "
                "Use loftq: the same idea with the base untouched"
            )
        return variant

    @model_validator(mode="after")
    def _factory_reads_the_file(self):
        if self.factory and self.rope_scaling:
            raise ValueError(
                f"model.rope_scaling: {self.factory} makes the model of config.json as it is. Write it there, or leave "
                "it out"
            )
        return self

    @model_validator(mode="after")
    def _remote_code_is_pinned(self):
        is_folder = self.base_model != EMBEDDED_BASE and Path(self.base_model).expanduser().is_dir()
        if self.trust_remote_code and not is_folder and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"model.trust_remote_code=true: needs a 40-digit model.revision, got {self.revision!r}. "
                "Pin the commit whose code you have read."
            )
        return self


class QuantizationConfig(Section):
    """How the frozen base is stored."""

    type: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit data type of the frozen base; nf4 from QLoRA (arXiv:2305.14314). "none" keeps it in the compute dtype."""
    double_quant: bool = True
    """Quantize the block scales too: 0.37 bit a parameter less, at no measurable loss."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """dtype of activations and products; auto: bfloat16 on GPUs that have it, float16 on older, float32 on CPU."""
