"""What a user may ask: the YAML file and its overrides, checked and frozen. Imports no torch, no ray."""

import datetime
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from qlora_ray.environment import hide_secrets
from qlora_ray.errors import ConfigError

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
EMBEDDED_BASE = "embedded"


class Section(BaseModel):
    """A section of the YAML file: no unknown keys, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


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
    factory: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """package.module:function that makes the model of its config, for one that transformers does not have."""

    @field_validator("base_model", "start_from")
    @classmethod
    def _folder_is_found_from_elsewhere(cls, name):
        # Ray's workers start in a folder of their own, and an adapter's record is read from anywhere.
        if name in (None, EMBEDDED_BASE) or not Path(name).expanduser().is_dir():
            return name
        return str(Path(name).expanduser().absolute())

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
        return {"sft": "answers", "kto": "labels"}.get(self.objective, "pairs")  # type: ignore[return-value]

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


class DataSource(Section):
    """One of several sources of records, with its own settings."""

    path: str = Field(min_length=1)
    """A file, glob, folder, URI or hub data set id."""
    weight: float = Field(1.0, gt=0)
    """How often each record appears in an epoch: 2.0 twice, 0.5 a seeded half of them once."""
    split: str | None = None
    """Split or slice of this entry, as in data.split; default: data.split, for validation "validation"."""
    name: str | None = None
    """Configuration of a hub data set (load_dataset's `name`), or of a folder whose README.md lists some."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; default: data.revision."""


def _shape_of(value: Any) -> str:
    return "list" if isinstance(value, list) else "mapping" if isinstance(value, dict | DataSource) else "str"


_Path = Annotated[str, Field(min_length=1), Tag("str")]
_Mapping = Annotated[DataSource, Tag("mapping")]
_Entry = Annotated[_Path | _Mapping, Discriminator(_shape_of)]
# Told apart by shape, so that a mistake in one entry is told once, and of that entry.
DataFiles = Annotated[_Path | _Mapping | Annotated[list[_Entry], Tag("list")], Discriminator(_shape_of)]


class DataConfig(Section):
    """Records, and what of them is trained on: [data.md](data.md)."""

    train_file: DataFiles = "data/sample_data.json"
    """Path, glob, folder, URI or hub data set id; or a list of those or of {path, weight}. See docs/data.md."""
    validation_file: DataFiles | None = None
    """Validation records, named as above; without it validation_split of the training records are held out."""
    validation_split: float = Field(0.1, ge=0, lt=1)
    """Share of the training records held out for validation; 0 turns validation off."""
    format: str = "auto"
    """auto, alpaca, messages, sharegpt, prompt_completion, text, or package.module:function (record to messages)."""
    chat_template: str | None = None
    """Default: the tokenizer's own, else plain. Or plain, chatml, or a file with a Jinja template."""
    train_on: Literal[
        "all_assistant_turns", "last_turn", "last_exchange", "tool_calls", "last_tool_call", "everything"
    ] = "all_assistant_turns"
    """What the loss is taken over: all that the assistant says (thoughts and calls are part of it), the last turn, all
    turns after the last question, turns that call a tool, the last of those; or prompts too."""
    keep_thoughts: Literal["template", "all"] = "template"
    """Thoughts of earlier answers that the template leaves out: as it does, or all, one more sample for each."""
    date: str | None = None
    """Day that a chat template which prints the day prints, YYYY-MM-DD; default: the first day in this storage_path."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    split: str = "train"
    """Split to train on, of a hub data set or of a folder with splits; also a slice: train[:10%], train[100:200]."""
    order: Literal["shuffled", "given", "by_length"] = "shuffled"
    """shuffled: anew each epoch. given: as the files have it. by_length: the longest first. See docs/data.md."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop if more than this share of the records is unusable."""

    @field_validator("train_file", "validation_file")
    @classmethod
    def _names_something(cls, value):
        if value == []:
            raise ValueError("must name at least one file")
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _date_is_a_day(cls, date):
        try:
            return date and datetime.date.fromisoformat(str(date)).isoformat()  # YAML reads a day as a date
        except ValueError:
            raise ValueError("must be a day, YYYY-MM-DD") from None

    @field_validator("format")
    @classmethod
    def _format_is_known_or_a_function(cls, name):
        known = ("auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text")
        if name not in known and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
            raise ValueError(f"must be one of {', '.join(known)}, or package.module:function")
        return name

    def sources(self, key: str) -> list[DataSource]:
        """Entries of train_file or validation_file, in order; empty where there are none."""
        value = getattr(self, key)
        entries = [] if value is None else value if isinstance(value, list) else [value]
        return [entry if isinstance(entry, DataSource) else DataSource(path=entry) for entry in entries]


class DeepSpeedConfig(Section):
    """How base and optimizer are spread over the workers."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = 3
    """ZeRO stage: 3 shards the 4-bit base over the workers; auto: 3 with several workers, 0 with one."""
    share_base: Literal["auto", "replicate", "world"] = "auto"
    """How workers hold the 4-bit base at stage 3: replicate: each all of it, and no weights travel; world: each its
    share. auto: replicate where base and activations fit every GPU. The same bits in all."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Keep the layers' weights in each worker's host memory, or on a local disk (nvme), and bring them to the GPU one
    layer after the other while it computes (stage 3). Free GPU memory keeps the last layers."""
    nvme_path: str | None = None
    """A folder on a local disk of every node, for offload_params: nvme. The file there is gone when the run ends."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep the optimizer state in host memory."""
    config_file: str | None = None
    """DeepSpeed JSON merged over the plan: "auto" values are filled in, explicit ones win (also --deepspeed)."""


class RayConfig(Section):
    """Workers, cluster, and where run directories go: [cluster.md](cluster.md)."""

    address: str | None = None
    """Address of a running cluster ("auto" inside one); default: a private Ray on this machine."""
    allow_unauthenticated: bool = False
    """Connect to a cluster of other machines though it asks for no token. Only on a network closed to others."""
    num_workers: int | tuple[int, int] = 1
    """Ray Train workers, one GPU each (or CPU shares). The ZeRO group is all of them. [min, max]: as many as there is
    room for, more or fewer as nodes come and go; the result does not depend on how many
    (on CPUs with one and the same OMP_NUM_THREADS)."""
    elastic_resize_monitor_interval_s: float = Field(30, gt=0)
    """Seconds between looks for room for more workers, with [min, max]."""
    use_gpu: bool | Literal["auto"] = "auto"
    """auto: if the cluster has any."""
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Ray resources of one worker; default one CPU, and one GPU where GPUs are used."""
    storage_path: str = "runs"
    """Where run directories go: a folder (shared by all nodes) or a pyarrow URI such as s3://bucket/runs."""
    run_name: str | None = Field(None)
    """Name of the run directory; default: the config's name and the time."""
    max_failures: int = Field(3, ge=0)
    """Restarts from the last checkpoint after a failure. One that repeats without progress ends the run after three."""

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that there may be."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_a_number_or_a_range(cls, num_workers):
        ends = num_workers if isinstance(num_workers, list | tuple) else [num_workers] * 2
        numbers = [int(end) for end in ends if re.fullmatch(r"[1-9]\d*", str(end))]
        if len(numbers) != 2 or len(ends) != 2 or numbers[0] > numbers[1]:
            raise ValueError("must be a number of at least 1, or [min, max]")
        return tuple(numbers) if isinstance(num_workers, list | tuple) else numbers[0]

    @field_validator("storage_path", "address")
    @classmethod
    def _holds_no_password(cls, value):
        if value and hide_secrets(value) != value:
            raise ValueError("must hold no key or password: it would stand in logs. Set it in the nodes' environment")
        return value

    @field_validator("run_name")
    @classmethod
    def _run_name_is_a_plain_name(cls, name):
        if name is not None and not re.fullmatch(RUN_NAME, name):
            raise ValueError("must be 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit")
        return name


class CheckpointConfig(Section):
    """How often a run is saved: [reliability.md](reliability.md)."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints: the most that a failure can cost. Default: ten times a run, at most 200."""
    keep: int = Field(3, ge=1)
    """Number of newest checkpoints kept."""


class WatchdogConfig(Section):
    """Deadlines, in seconds, after which a worker counts as stuck: [reliability.md](reliability.md)."""

    load_seconds: float = Field(1800, gt=0)
    """Longest time from a worker's start to its first step; then the worker is ended and the run recovers."""
    step_seconds: float = Field(600, gt=0)
    """Longest optimizer step. Once three were seen, ten times the slowest counts instead."""
    evaluate_seconds: float = Field(3600, gt=0)
    """Longest validation; learned in the same way."""
    save_seconds: float = Field(600, gt=0)
    """Longest checkpoint; learned in the same way."""
    min_seconds: float = Field(60, gt=0)
    """No learned deadline is shorter than this."""
    frozen_seconds: float = Field(120, gt=0)
    """A worker process that answers nothing for so long is killed."""


class LoggingConfig(Section):
    """What is written down while a run goes on."""

    every_steps: int = Field(10, ge=1)
    """Steps between lines of metrics.jsonl; each waits once for the GPU."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(default_factory=list)
    """Where the lines of metrics.jsonl go too, under the same names; each is an extra, e.g. "qlora_ray[wandb]"."""


class EvaluationConfig(Section):
    """Answers to held-out prompts."""

    num_prompts: int = Field(8, ge=0)
    """Held-out prompts answered at the end by base and adapter, compared exactly; 0 turns it off."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer generated, in tokens."""
    num_samples: int = Field(2, ge=0)
    """So many of them are answered at each validation too, for the report; 0 turns it off."""


class Parameter(Section):
    """Where a setting's values come from: exactly one of these."""

    grid: list[Any] | None = Field(None, min_length=1)
    """Every value, with every combination of the other parameters (sweep.search=grid)."""
    choice: list[Any] | None = Field(None, min_length=1)
    """One of these."""
    uniform: tuple[float, float] | None = None
    """[low, high]."""
    loguniform: tuple[float, float] | None = None
    """[low, high], uniform in the logarithm: for learning rates."""
    randint: tuple[int, int] | None = None
    """[low, high], both included."""

    @property
    def kind(self) -> str:
        """Which of them is given, e.g. "loguniform"."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> list[Any]:
        """What a grid or choice lists; of a range its ends."""
        return list(getattr(self, self.kind))

    @model_validator(mode="after")
    def _is_one_range_that_is_not_empty(self):
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must be exactly one of {', '.join(type(self).model_fields)}; got {given or 'none'}")
        if self.kind in ("uniform", "loguniform", "randint"):
            low, high = self.values
            if not low < high:
                raise ValueError(f"is an empty range: {low:g} is not below {high:g}")
            if self.kind == "loguniform" and low <= 0:
                raise ValueError(f"needs a range above 0, since its logarithm is taken; got {low:g}")
        return self


class AshaOptions(Section):
    """When a bad trial is stopped, under the names of Ray Tune's ASHAScheduler."""

    grace_period: int | None = Field(None, ge=1)
    """Steps that every trial gets; default: up to its first report."""
    reduction_factor: float = Field(3, gt=1)
    """Of the trials that reach a rung, one in so many goes on; rungs are grace_period times powers of this."""


class PbtOptions(Section):
    """When a bad trial goes on from a good one, under the names of Ray Tune's PopulationBasedTraining."""

    perturbation_interval: int | None = Field(None, ge=1)
    """Steps between exploits; default: training.eval_every_steps."""
    quantile_fraction: float = Field(0.25, gt=0, le=0.5)
    """The worst share of the trials goes on from a trial of the best share."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """Chance that a parameter is drawn anew instead of changed by a factor of 0.8 or 1.2."""
    synch: bool = False
    """Let every trial reach the same step before any exploits; else each decides by what is known then."""


class SweepConfig(Section):
    """Which settings vary between trials, and what decides: [sweeps.md](sweeps.md)."""

    parameters: dict[str, Parameter] = Field(min_length=1)
    """Any dotted key of this file to grid, choice, uniform, loguniform or randint."""
    metric: Literal[
        "eval_loss", "eval_perplexity", "loss", "exact_match_adapter", "eval_rewards/accuracies",
        "eval_rewards/margins", "eval_rewards/chosen", "eval_logps/chosen",
    ] = "eval_loss"  # fmt: skip
    """What decides between trials: the lowest loss or perplexity, of the others the highest."""
    search: Literal["random", "grid", "optuna"] = "random"
    """random and grid know all trials from the start; optuna (extra "optuna") learns from those that ended."""
    num_trials: int | None = Field(None, ge=1)
    """Trials of random and optuna (default 8); a grid's number follows from its values."""
    scheduler: Literal["fifo", "asha", "pbt"] = "fifo"
    """fifo: every trial to its end. asha: bad ones are stopped early. pbt: bad ones go on from good ones' weights."""
    asha: AshaOptions = AshaOptions()
    """Of sweep.scheduler=asha."""
    pbt: PbtOptions = PbtOptions()
    """Of sweep.scheduler=pbt."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides which trials there are."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials that run at a time; default: as many as the cluster has room for."""
    time_budget_seconds: float | None = Field(None, gt=0)
    """Wall time of the sweep, resumptions together; then trials stop with a checkpoint."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens that all trials together may train on; then they stop with a checkpoint."""
    max_failed_trials: int = Field(3, ge=0)
    """A sweep with more failed trials than this ends."""

    @model_validator(mode="after")
    def _parts_fit_together(self):
        for key, parameter in self.parameters.items():
            if self.search == "grid" and parameter.kind != "grid":
                raise ValueError(
                    f"sweep.search=grid: {key} is {parameter.kind}. List its values with grid, or use random."
                )
            if self.search != "grid" and parameter.kind == "grid":
                raise ValueError(f"sweep.search={self.search}: {key} is a grid. Use choice, or sweep.search=grid.")
            if self.search == "optuna" and any(isinstance(value, list | dict) for value in parameter.values):
                raise ValueError(f"sweep.search=optuna: {key} lists a list. It knows texts and numbers; use random.")
        if self.search == "grid" and self.num_trials is not None:
            raise ValueError("sweep.num_trials: a grid has as many trials as combinations. Leave it out.")
        if self.search == "optuna" and self.scheduler == "pbt":
            raise ValueError("sweep.scheduler=pbt: finds its own values while it runs. Use sweep.search=random.")
        return self


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


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply dotted `key.path=value` overrides, and validate.

    Raises ConfigError for whatever a user can get wrong.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return make_config(values)


def make_config(values: dict[str, Any]) -> Config:
    """Validate nested values. Raises ConfigError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def as_written(config: Config) -> dict[str, Any]:
    """Nested values that make this config again: as asked, for a base that is stored in 4 bits decides what was not."""
    quantization = config.quantization.model_dump(mode="json", exclude_unset=True)
    return {**config.model_dump(mode="json"), "quantization": quantization}


def bundled_root() -> Path:
    """The folder that holds configs/ and data/: the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    return package / "_bundled" if (package / "_bundled").is_dir() else package.parent


def find_file(name: str) -> Path:
    """A user's relative path: from the current folder, else from the files that come with the package."""
    path = Path(name).expanduser()
    if not path.exists() and not path.is_absolute() and (bundled_root() / path).exists():
        return bundled_root() / path
    return path


def base_model_path(base_model: str) -> str:
    """The folder of a local or embedded base; a hub id stays as it is."""
    if base_model == EMBEDDED_BASE:
        return str(Path(__file__).resolve().parent / "assets" / "tiny_base")
    return str(Path(base_model).expanduser()) if Path(base_model).expanduser().is_dir() else base_model


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return dotted


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"-c {path}: no such file.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"-c {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"-c {path}: not UTF-8 text (byte {error.start}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"-c {path}:{where}: not YAML: {getattr(error, 'problem', error)}.") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"-c {path}: must hold sections such as `training:`, found a {type(values).__name__}.")
    # A section whose keys are all commented out is an empty one.
    sections = Config.model_fields.keys() - {"sweep"}  # which may be left out
    return {key: {} if value is None and key in sections else value for key, value in (values or {}).items()}


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is written section.key=value, e.g. training.learning_rate=1e-4.")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {section!r} is a value, not a section.")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[name] = text


def _known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not DataSource:
                keys += _known_keys(kind, f"{prefix}{name}.")
    return keys


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = [str(part) for part in item["loc"]]
        key = ".".join(
            part for part in where if not re.match(r"(literal|function|constrained|list|mapping|bool|str|int)\b", part)
        )
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key.{_nearest(key)}")
        elif item["type"] == "value_error" and len(item["loc"]) < 2:  # from a section's own check: it names the key
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            rule = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key}={_shown(item['input'])}: {rule[0].lower() + rule[1:]}.")
    return "\n".join(dict.fromkeys(lines))


def _shown(value: Any) -> str:
    text = hide_secrets(str(value) if isinstance(value, str | int | float) else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(key: str) -> str:
    known = _known_keys()
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    last = key.rsplit(".", 1)[-1]
    same_name = [name for name in known if name.rsplit(".", 1)[-1] == last]
    named = same_name[:1] or close
    return f" Did you mean {named[0]}?" if named else f" Known sections: {', '.join(Config.model_fields)}."
