"""How a worker gets the base: whole or its share, and its 4-bit weights from the cache or into it."""

import contextlib
import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from qlora_ray.errors import ConfigError
from qlora_ray.model.apart import Apart, pass_between_workers
from qlora_ray.model.facts import read_facts, stored_quantization
from qlora_ray.model.homes import Away, DiskFile, network_file_system
from qlora_ray.model.host import available_bytes
from qlora_ray.model.hub import local_folder
from qlora_ray.model.load import Cache, Keeper, Source, Whole, files_of, load_shares
from qlora_ray.model.packed_cache import Cached, Writer, cached
from qlora_ray.model.ring import Ring
from qlora_ray.planning.memory import BYTES_PER_WEIGHT, GIB, begins_whole
from qlora_ray.planning.plan import Plan
from qlora_ray.worker import deepspeed_patches as patches
from qlora_ray.worker.messages import Run, Warned
from qlora_ray.worker.team import Team

WORTH_KEEPING_GIB = 1.0
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The base on this worker."""

    base: PreTrainedModel
    sources: list[Source]  # what can be read again
    is_share: bool
    away: Away | None = None  # who has put its weights where they pass from
    apart: Apart | None = None  # who keeps parts of it, or will: where workers share it


def load(run: Run, team: Team, device: torch.device) -> Loaded:
    """Load the base. Every worker must call this. Raises ConfigError where it, or its cache, cannot be read."""
    config, plan = run.config, run.plan
    apart = None
    if plan.shares_base and team.size > 1:
        apart = Apart(device, _group_of_node(team) if plan.is_shared_by_node else None)
    is_share = apart is not None and not begins_whole(config)
    place = _cache_of(run, device)
    away = _away_of(run, team) if config.deepspeed.offload_params != "none" else None
    keeper: Keeper = away or Whole()
    if apart is not None and is_share:
        keeper = apart

    def load_with(cache: Cache) -> Loaded:
        how = config.model, config.quantization, plan.compute_dtype, device, keeper, cache
        return Loaded(*load_shares(*how), is_share, away, apart)

    if place is None:
        return load_with(Cache())
    with contextlib.ExitStack() as stack:
        # What rank 0 finds is so for all: elsewhere the files of the base may have another date.
        what, folder = team.gather(_look(place, stack) if team.rank == 0 else None)[0]
        logger.info("4-bit weights: %s %s", what, folder)
        if what == "reads":
            return load_with(Cache(dataclasses.replace(place, folder=Path(folder)).read()))
        if what == "waits for nobody at":
            return load_with(Cache())
        writer = Writer(Path(folder), team.rank, team.size)
        loaded = load_with(Cache(writer=writer))
        failed = [why for why in team.gather(writer.close()) if why]
        if team.rank == 0 and failed:
            shutil.rmtree(folder, ignore_errors=True)
            team.tell(Warned(f"the 4-bit weights could not be kept in {place.folder.parent}: {failed[0]}"))
        elif team.rank == 0:
            place.finish(Path(folder))
        return loaded


def share_out(model: torch.nn.Module, apart: Apart, plan: Plan) -> Ring | None:
    """Have fused layers pass between the workers, and make ZeRO-3's parameters of other parts.

    Every worker must call this. None where no layer is fused.
    """
    ring = pass_between_workers(model, apart)
    in_parts = [parameter for parameter in model.parameters() if hasattr(parameter, "part")]
    if in_parts:
        shares = patches.Shares(plan.deepspeed, getattr(torch, plan.compute_dtype), apart.group)
        for parameter in in_parts:
            shares.keep(parameter, apart.take_part(parameter))
    return ring


def _group_of_node(team: Team) -> Any:
    """The process group of this node's workers. Every worker must call this."""
    nodes = team.gather(os.environ.get("NODE_RANK", "0"))  # which Ray Train sets
    groups = {
        node: dist.new_group([r for r, other in enumerate(nodes) if other == node]) for node in sorted(set(nodes))
    }
    return groups[nodes[team.rank]]


def _away_of(run: Run, team: Team) -> Away:
    """Where this worker puts the weights that pass. Raises ConfigError where there is no room for them."""
    ds, passing = run.config.deepspeed, run.plan.passing
    assert passing is not None
    free = available_bytes()  # also what other workers of this node have not taken yet
    if passing.host_bytes > free:
        raise ConfigError(
            f"deepspeed.offload_params={ds.offload_params}: a worker keeps {passing.host_bytes / GIB:.2f} GiB in host "
            f"memory, and {free / GIB:.2f} are free. Use fewer workers a node, or nvme with deepspeed.nvme_path."
        )
    if ds.nvme_path is None:
        return Away()
    if kind := network_file_system(ds.nvme_path):
        team.tell(Warned(f"deepspeed.nvme_path={ds.nvme_path}: lies on {kind}, every step waits for the network."))
    return Away(DiskFile(ds.nvme_path, int(passing.disk_bytes)))


def _look(place: Cached, stack: contextlib.ExitStack) -> tuple[str, str]:
    """What is done with the cache, and the folder."""
    if place.is_there():
        return "reads", str(place.folder)
    if not stack.enter_context(place.lock()):
        return "waits for nobody at", str(place.folder)  # another run writes it
    if place.is_there():  # since it was looked for
        return "reads", str(place.folder)
    return "writes", str(place.begin())


def _cache_of(run: Run, device: torch.device) -> Cached | None:
    """Where the run keeps the packed weights; None where it does not."""
    model, quantization, storage = run.config.model, run.config.quantization, run.folder.parent
    folder = local_folder(model.base_model, model.revision)
    is_packed_here = quantization.type != "none" and stored_quantization(folder) is None
    if not (model.cache_quantized and is_packed_here and storage.is_local):
        return None
    if model.cache_quantized == "auto":
        bytes_of_it = read_facts(folder).num_linear_parameters * BYTES_PER_WEIGHT[quantization.double_quant]
        is_worth_it = bytes_of_it >= WORTH_KEEPING_GIB * GIB
        if not (is_worth_it and shutil.disk_usage(storage.path).free >= 2 * bytes_of_it):
            return None
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    settings = quantization.model_dump()
    return cached(Path(storage.path) / "cache", files_of(model), settings, run.plan.compute_dtype, kind)
