"""What happens on a worker before step 1: logs, model, adapter, engine, and the proof that sharding changed nothing.

Stands on internals of torch and transformers: WORKSPACE and NOISE.
"""

import dataclasses
import logging
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qlora_ray import laps
from qlora_ray.config import Config, base_model_path
from qlora_ray.data.rows import chat_template_of, open_rows
from qlora_ray.data.tokenize import open_tokenizer, with_template
from qlora_ray.errors import ConfigError, GuardError
from qlora_ray.libraries import Patch
from qlora_ray.model.adapter import ADAPTER_NAME, add_adapter, trainable
from qlora_ray.model.balance import balance
from qlora_ray.model.base import count_bytes
from qlora_ray.model.facts import read_facts
from qlora_ray.model.fused import fuse, fused_layers, is_fused
from qlora_ray.model.homes import Away
from qlora_ray.model.hub import local_folder
from qlora_ray.model.plain import plain_layers
from qlora_ray.model.recompute import LONG_ROW
from qlora_ray.model.ring import Ring, make_ring
from qlora_ray.model.row_group import make_row_group
from qlora_ray.model.start import WEIGHTS, load_weights
from qlora_ray.model.traits import own_dropout
from qlora_ray.planning.plan import Plan
from qlora_ray.rundir import names
from qlora_ray.storage import SHARE_IT, Folder
from qlora_ray.worker import base, recomputation
from qlora_ray.worker import deepspeed_patches as patches
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.engine import Engine
from qlora_ray.worker.graphs import gains_from_graphs
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats
from qlora_ray.worker.messages import Run
from qlora_ray.worker.state import AdapterState
from qlora_ray.worker.team import Team
from qlora_ray.worker.warm import warm_up

GUARD_TOKENS = 64
SHARE_TOLERANCE = 0.01
# The same kernels on the same values: only the order of sums may differ. 4-bit weights that were cast by mistake
# change a loss by 4e-3 of its value and more.
GUARD_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}

WORKSPACE = Patch(
    "torch", "2.13.0", "CUBLAS_WORKSPACE_CONFIG is there for the first product alone",
    gains="50 us of the host at every product: PyTorch wants it and asks at the first, but reads it at each one while "
    "it is there; one workspace a stream makes cuBLAS reproducible (docs.nvidia.com/cuda/cublas: Reproducibility)",
    delete_when="PyTorch parses it once",
)  # fmt: skip
NOISE = Patch(
    "transformers", "5.23.0", "neftune_post_forward_hook reads neftune_noise_alpha of the embeddings",
    gains="NEFTune as transformers' Trainer does it, on the embeddings of a PEFT model",
    delete_when="activate_neftune, which takes a PEFT model, is in every version that pyproject.toml allows",
)  # fmt: skip


def send_output_to_log(run_folder: Folder, rank: int, debug: bool) -> str | None:
    """Append this process's stdout and stderr, C++ included, to logs/worker_<rank>.log of a local run directory.

    Returns the folder of the logs, None where the run directory is not local.
    """
    root, console = logging.getLogger(), logging.StreamHandler()
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler):
            root.removeHandler(handler)  # Ray Train's, which leaves the time out
    console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(console)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    if not run_folder.is_local:
        return None
    folder = (run_folder / names.LOGS).make()
    if not debug:
        handle = os.open(f"{folder.path}/worker_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)
    return folder.path


def choose_kernels(config: Config, device: torch.device) -> None:
    """Allow only kernels that add in a fixed order, where training.deterministic asks for it."""
    if not config.training.deterministic:
        return
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # else every buffer is written once more
    if device.type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        one = torch.ones(16, 16, device=device)
        torch.mm(one, one)
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]


def choose_memory(config: Config, plan: Plan, device: torch.device) -> None:
    """Have pieces of GPU memory grow where rows are long: of some GiB each, they else leave gaps that none fits.

    Workers that share the base read each other's memory, which such pieces do not allow. Call it before any tensor.
    """
    if device.type == "cuda" and config.training.max_length > LONG_ROW and not plan.shares_base:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def check_shared(run_folder: Folder, team: Team) -> None:
    """Refuse a storage path that some worker does not see, before the model loads. Every worker must call this.

    Raises ConfigError.
    """
    sees = team.gather((run_folder / names.MANIFEST).exists())
    if not all(sees):
        blind = [rank for rank, seen in enumerate(sees) if not seen]
        raise ConfigError(
            f"ray.storage_path: workers {blind} do not see {run_folder.path}, which the driver wrote. {SHARE_IT}"
        )


def out_of_memory_message(config: Config, plan: Plan, rank: int, error: Exception) -> str:
    """What to change, in order, with what the plan expects each to save."""
    forecast, training = plan.memory_forecast_gib, config.training
    half = forecast["activations"] / 2
    levers = [f"training.batch_size={training.batch_size // 2} (about {half:.1f} GiB)"] * (training.batch_size > 1)
    levers.append(f"training.max_length={training.max_length // 2} (about {half:.1f} GiB)")
    if plan.recompute == "none":
        levers.insert(0, f"training.recompute=all (most of {2 * half:.1f} GiB)")
    elif plan.recompute == "auto":
        levers.insert(0, "a lower training.memory_budget_gib (recompute=auto fills it, or 90% of what is free)")
    if config.deepspeed.offload_params == "none" and plan.zero_stage == 3:
        levers.append(f"deepspeed.offload_params=cpu (about {forecast['base']:.1f} GiB)")
    return f"worker {rank} is out of memory ({str(error).splitlines()[0]}). What helps, in order: {'; '.join(levers)}."


def tokenizer_of(config: Config, rows: Folder):
    """The tokenizer that made the rows, with the chat template that it used, and a pad token that has an embedding."""
    model = config.model
    base = base_model_path(model.base_model)
    tokenizer = open_tokenizer(base, model.revision, model.trust_remote_code, model.new_tokens)
    num_embeddings = read_facts(local_folder(model.base_model, model.revision)).num_embeddings
    if num_embeddings is not None and tokenizer.pad_token_id >= num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token  # neither attended to nor trained on, so any id will do
    return with_template(tokenizer, chat_template_of(rows))


def num_rows(rows: Folder) -> int:
    """Rows of the training split."""
    return len(open_rows(rows, "train"))


def build_engine(run: Run, team: Team, device: torch.device, pad_token_id: int, resumed: AdapterState | None) -> Engine:
    """4-bit base, LoRA, DeepSpeed; resumed where there is a checkpoint; checked against the unsharded base.

    Every worker must call this. Raises ConfigError where the base cannot be loaded, and GuardError where it is not
    what the plan says, or sharding changed it.
    """
    config, plan = run.config, run.plan
    dtype = getattr(torch, plan.compute_dtype)
    log = logging.getLogger(__name__)
    log.info("base model: loading")
    with laps.part("base"), ThreadPoolExecutor(1) as beside:
        warmed = beside.submit(warm_up, device, dtype) if device.type == "cuda" else None
        loaded = base.load(run, team, device)
        if warmed:
            warmed.result()
    log.info("base model: loaded%s", ", each worker its share" if loaded.is_share else "")
    check_four_bit_share(count_bytes(loaded.base).four_bit_share, plan)
    with laps.part("adapter"):
        model = add_adapter(loaded.base, config.model, dtype, config.training.seed, plan.new_tokens)
        _put_in_one_dtype(model, dtype)
        if resumed:
            for name, parameter in trainable(model).items():
                parameter.data.copy_(resumed.weights[name])
        elif config.model.start_from:
            load_weights(model, (run.folder / names.START_FROM / WEIGHTS).read_bytes(), ADAPTER_NAME)
        share_rows(model, config.training.sequence_parallel, fuse(model), team)
        ring = _ring_of(model, loaded.away, config, device) if loaded.away else None
    if ring and plain_layers(model) and plan.recompute == "none":
        plan = dataclasses.replace(plan, recompute="all")  # autograd would find the weights of other layers
    sample = to_tensors(open_rows(run.rows, "train").gather(np.array([0])), pad_token_id, device)
    sample = {name: values[:, :GUARD_TOKENS] for name, values in sample.items() if values.dim() == 2}
    with laps.part("guard"):
        before = None if loaded.is_share else _loss(model, sample)
    if loaded.apart:
        with laps.part("base"):
            ring = base.share_out(model, loaded.apart, plan)
    plan = recomputation.prepare(model, plan, device)
    if config.training.neftune_noise_alpha:
        _add_noise_to_embeddings(model, config.training.neftune_noise_alpha)
    if config.training.router_aux_loss_coef:
        balance(model, config.training.router_aux_loss_coef)
    if run.debug and team.rank == 0:
        log.info("parameters:\n%s", parameter_table(model, plan))
    log.info("engine: starting")
    with laps.part("engine"):
        engine = Engine(model, config.training, plan.deepspeed, plan.shares_base, ring if loaded.apart else None)
    log.info("engine: started")
    if resumed:
        engine.load_state(resumed)
    with laps.part("guard"):
        check_same_weights(loaded, config.training.seed, team, ring)
        if before is not None:
            check_same_loss(before, _loss(engine.module, sample), plan)
    choice = recomputation.keep_what_fits(model, config, plan, device, ring if loaded.away else None)
    if gains_from_graphs(model, config, plan, choice) and recomputation.fits_twice(model, config, plan, device):
        log.info("micro-batches are launched as one graph each, once their shape has come a few times")
        engine.record_graphs(plan.longest_sample)
    engine.train()
    return engine


def _ring_of(model: torch.nn.Module, away: Away, config: Config, device: torch.device) -> Ring:
    """What the layers' weights pass through. Raises ConfigError for a model whose layers are not known."""
    ring = make_ring(model, away, device)
    if ring is None:
        raise ConfigError(
            f"deepspeed.offload_params={config.deepspeed.offload_params}: this model does not mark its decoder layers "
            "(GradientCheckpointingLayer of transformers), so nothing of it can pass. Leave the setting out."
        )
    return ring


def share_rows(model: Any, size: int, what_is_fused: str, team: Team) -> None:
    """Have `size` workers hold each row together. Every worker must call this.

    Raises ConfigError where a layer attends to no more than the part that it is given.
    """
    if size > 1 and not (is_fused(model) and getattr(model, "takes_borders", False)):
        raise ConfigError(
            f"training.sequence_parallel={size}: only fused layers attend to rows that workers share, and not all are "
            f"({what_is_fused}). Set it to 1."
        )
    if size > 1 and any(own_dropout(layer.attention) for layer in fused_layers(model)):
        raise ConfigError(
            f"training.sequence_parallel={size}: the base's config has dropout of attention, which each worker would "
            "draw for its own heads as if they were all. Set attention_dropout to 0 in its config.json, or use 1."
        )
    model.row_group = make_row_group(team.rank, team.size, size)


def check_four_bit_share(measured: float, plan: Plan) -> None:
    """Raise GuardError where another share of the base is in 4 bits than the plan, and the user, reckoned with."""
    if abs(measured - plan.four_bit_share) > SHARE_TOLERANCE:
        raise GuardError(
            f"{measured:.1%} of the base's parameters are in 4 bits, the plan says {plan.four_bit_share:.1%}. The run "
            "was stopped before step 1: its memory and its result would not be those that were planned. Please report "
            "the base's config.json."
        )


def check_same_loss(before: float, after: float, plan: Plan) -> None:
    """Raise GuardError where sharding changed the loss of a batch."""
    if not abs(after - before) <= GUARD_TOLERANCE[plan.compute_dtype] * max(1.0, abs(before)):
        raise GuardError(
            f"loss of one batch before sharding {before:.6f}, after {after:.6f}: ZeRO stage {plan.zero_stage} changed "
            f"the weights. Likely cause: packed 4-bit bytes were cast to {plan.compute_dtype} (bnb_4bit_quant_storage "
            "must be uint8), or a DeepSpeed option re-quantizes them. The run was stopped before step 1."
        )


def check_same_weights(loaded: base.Loaded, seed: int, team: Team, ring: Ring | None = None) -> None:
    """Raise GuardError where the workers do not hold together what the files hold: of a layer in 4 bits and another.

    Those are chosen by seed; the first of those that hold one reads and packs it anew. Every worker must call this.
    """
    generator = random.Random(seed)
    packed = [one for one in loaded.sources if hasattr(one.parameter, "quant_state")]
    others = [one for one in loaded.sources if not hasattr(one.parameter, "quant_state")]
    rank = loaded.apart.share.rank if loaded.apart else team.rank  # among those that hold the base together
    for source in [generator.choice(kind) for kind in (packed, others) if kind]:
        if ring:
            ring.bring(source.parameter)
        whole = patches.whole_of(source.parameter)
        if not all(team.gather(rank > 0 or source.is_held(whole))):
            raise GuardError(
                f"{source.name}: what the workers hold together is not what the base's files give. Likely cause: "
                "packed 4-bit bytes were cast (bnb_4bit_quant_storage must be uint8), a DeepSpeed option re-quantizes "
                "them, or the workers do not read the same files. The run was stopped before step 1."
            )


def parameter_table(model: torch.nn.Module, plan: Plan) -> str:
    """One line a parameter: how it is stored, whether it is trained, whether ZeRO shards it."""
    lines = [f"{'stored':10} {'trained':7} {'sharded':7} {'shape':20} name"]
    for name, parameter in model.named_parameters():
        packed = getattr(parameter, "quant_state", None)
        shape = tuple((packed or parameter).shape)
        stored = "4-bit" if packed else str(parameter.dtype).removeprefix("torch.")
        trained, sharded = "yes" if parameter.requires_grad else "no", "yes" if plan.shares_base else "no"
        lines.append(f"{stored:10} {trained:7} {sharded:7} {shape!s:20} {name}")
    return "\n".join(lines)


def _loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        # Without a label in the first tokens, any token will do.
        if not num_label_tokens(batch):
            batch = {**batch, "labels": batch["input_ids"]}
        return float(sum_of_nats(model, batch) / num_label_tokens(batch))


def _put_in_one_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        is_number = parameter.is_floating_point() and not hasattr(parameter, "quant_state")  # packed bytes are none
        if is_number and parameter.dtype != dtype:
            logging.getLogger(__name__).info("%s: %s to %s, as the engine does", name, parameter.dtype, dtype)
            parameter.data = parameter.data.to(dtype)


def _add_noise_to_embeddings(model: Any, alpha: float) -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    embeddings.register_forward_hook(neftune_post_forward_hook)
