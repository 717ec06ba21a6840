"""What the decoder layers of this worker keep for backward: measured where they are not fused, chosen to fit."""

import logging
import math
import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model import host
from qlora_ray.model.fused import fused_layers, keep
from qlora_ray.model.plain import keep_plain, measure_whole_bytes, plain_layers
from qlora_ray.model.recompute import Choice, Keep, Room, activation_bytes, host_bytes
from qlora_ray.model.ring import Ring
from qlora_ray.model.stash import HostStash
from qlora_ray.planning.memory import CUBLAS_BYTES
from qlora_ray.planning.plan import Plan, choose_recomputation
from qlora_ray.worker import deepspeed_patches as patches

SHARE_OF_MEASURED = 0.94  # of a budget, where no layer is fused: one row tells what a layer keeps, not what passes by
SHARE_OF_FREE_MEMORY = 0.9  # that recompute=auto fills: the rest is for the allocator's rounding and libraries
logger = logging.getLogger(__name__)


def prepare(model: Any, plan: Plan, device: torch.device) -> Plan:
    """The plan, with what a layer keeps as measured where layers are not fused. Call it before the engine is built."""
    fused, plain = fused_layers(model), plain_layers(model)
    if plan.recompute == "none" or (fused and not plain):
        return plan
    model.enable_input_require_grads()  # else the first layer's checkpoint finds nothing that wants a gradient
    if not fused and not plain:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        logger.info("recompute=%s: every layer computes again, the model does not mark its layers", plan.recompute)
    if plan.recompute == "all" or fused or not plain:
        return plan
    row = torch.arange(plan.longest_sample, device=device) % model.config.vocab_size
    measured = measure_whole_bytes(model, row[None], patches.gathered)
    logger.info("a layer keeps %d bytes a token, the plan said %d", measured, plan.layer_shape.kept_bytes(Keep.ALL))
    return replace(plan, layer_shape=plan.layer_shape.measured(measured))


def keep_what_fits(
    model: Any, config: Config, plan: Plan, device: torch.device, ring: Ring | None = None
) -> Choice | None:
    """Choose what each decoder layer keeps, and which weights stay. Call it when all else has its memory.

    Every worker must call this. None where the model does not mark its layers.
    """
    fused, plain = fused_layers(model), plain_layers(model)
    if not fused and not plain:
        return None
    budget, on_host = _room_for_activations(model, config, plan, device), _room_on_host(device)
    # Plain layers' weights come one by one under ZeRO-3, and workers that share rows attend together: all must compute
    # the same layers again.
    if not fused or config.training.sequence_parallel > 1:
        least = torch.tensor([budget, on_host], dtype=torch.float64, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        budget, on_host = least.tolist()
    room = Room(budget if fused else SHARE_OF_MEASURED * budget, on_host)
    choice = choose_recomputation(plan, len(fused or plain), model.config.vocab_size, room)
    parked = host_bytes(plan.layer_shape, choice, plan.tokens_per_micro_batch)
    if parked > room.host_bytes:
        raise ConfigError(
            f"training.max_length={config.training.max_length}: the layers' inputs take {parked / 2**30:.1f} GiB of "
            f"host memory a worker, and this machine or its container has {room.host_bytes / 2**30:.1f} GiB left for "
            "them. Give it more, or use training.recompute=auto, fewer rows a pass or shorter ones."
        )
    stash = HostStash(device) if device.type == "cuda" and plain else None
    if fused:
        keep(model, choice)
        beside = Keep.ALL if plan.recompute == "none" else Keep.HOST
        keep_plain(plain, (beside,) * len(plain), stash)
    else:
        # Weights that pass are there when a layer computes again, not when autograd goes back through it.
        levels = tuple(max(level, Keep.INPUT if ring else Keep.ALL) for level in choice.levels)
        keep_plain(plain, levels, stash)
    logger.info("%s (%.1f GiB for activations, %.1f GiB on the host)", choice, budget / 2**30, parked / 2**30)
    if ring:
        tokens = plan.tokens_per_micro_batch
        left = budget - activation_bytes(plan.layer_shape, choice, tokens, model.config.vocab_size)
        ring.keep_last(max(0, min(len(ring.slabs), int(left // max(slab.num_bytes for slab in ring.slabs)))))
        logger.info("%d of %d layers pass from %s", ring.num_passing, len(ring.slabs), config.deepspeed.offload_params)
    return choice


def fits_twice(model: Any, config: Config, plan: Plan, device: torch.device) -> bool:
    """Whether all that fused layers keep for backward has room twice: what a graph holds, nothing else can use."""
    if device.type != "cuda":
        return False
    choice = Choice((Keep.ALL,) * len(fused_layers(model)))
    once = activation_bytes(plan.layer_shape, choice, plan.tokens_per_micro_batch, model.config.vocab_size)
    return 2 * once <= _room_for_activations(model, config, plan, device)


def _coming_bytes(model: torch.nn.Module) -> int:
    """Of embedding and output layer, which ZeRO-3 brings while a micro-batch passes, where workers share them."""
    in_layers = {id(parameter) for layer in plain_layers(model) for parameter in layer.parameters()}
    return sum(
        patches.whole_shape(parameter).numel() * parameter.element_size()
        for parameter in model.parameters()
        if not (parameter.requires_grad or parameter.numel() or id(parameter) in in_layers)
    )


def _room_on_host(device: torch.device) -> float:
    """Bytes of host memory for this worker's layers; nothing is parked on a CPU."""
    if device.type != "cuda":
        return math.inf
    return host.SHARE * host.available_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _room_for_activations(model: torch.nn.Module, config: Config, plan: Plan, device: torch.device) -> float:
    """Bytes of this worker's GPU; nothing is chosen by memory on a CPU."""
    if device.type != "cuda":
        return 0.0
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device) + _coming_bytes(model)
    room = SHARE_OF_FREE_MEMORY * (free + torch.cuda.memory_reserved(device) - held)
    if config.training.memory_budget_gib:
        room = min(room, config.training.memory_budget_gib * 2**30 - held)
    shares = dist.get_world_size() if plan.zero_stage > 0 else 1
    # What the first step makes: AdamW's moments, and cuBLAS's room.
    return room - plan.num_trainable_parameters * (8 / shares + 4) - CUBLAS_BYTES
