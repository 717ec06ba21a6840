"""What a run will want of the nodes, from its config alone: before data is read and hardware known."""

from qlora_ray.cluster.found import Needs, Row
from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import ModelFacts
from qlora_ray.model.recompute import Keep
from qlora_ray.planning import memory, offload
from qlora_ray.planning.deepspeed import zero_stage
from qlora_ray.planning.hardware import Hardware, check_workers_fit, resources_of_a_worker, uses_gpu
from qlora_ray.planning.offload import Passing
from qlora_ray.planning.plan import gpu_of, storage_bytes
from qlora_ray.planning.sharing import refuse_sharing, shown_sharing, tokens_of_a_worker
from qlora_ray.planning.traffic import base_bytes

BYTES_PER_TOKEN = 12  # input_ids, labels and position_ids, int32 each
MICRO_BATCHES_AHEAD = 512  # of each worker in the object store (data/delivery.py)


def needs_of(config: Config, hardware: Hardware, base: ModelFacts | None) -> Needs:
    """Memory, disk and object store of a run; what depends on a base that is not here yet (None) is left out."""
    use_gpu, training = uses_gpu(config, hardware), config.training
    layer = memory.layer_shape(config, base, 2) if base else None
    if base and layer:
        refuse_sharing(config, base, layer, longest_row=0)  # of rows that are not read yet
    trainable = base.num_trainable_parameters if base else 0
    rows = training.batch_size * training.max_length * BYTES_PER_TOKEN * MICRO_BATCHES_AHEAD
    workers_a_node = -(-config.ray.max_workers // max(1, len(hardware.nodes)))
    passing, gathered = _traffic(config, base, hardware) if base and use_gpu else (None, None)
    return Needs(
        use_gpu=use_gpu,
        compute_dtype=config.quantization.compute_dtype,
        num_workers=config.ray.max_workers,
        worker_gib=_worker_gib(config, base) if base and use_gpu else None,
        storage_bytes=storage_bytes(config, trainable),
        object_store_bytes=rows * workers_a_node,
        row_parts=training.sequence_parallel,
        passing=passing,
        gathered_per_second=gathered,
        sharing=shown_sharing(config, layer, base.num_layers, training.max_length) if base and layer else "",
        unfit=_why_workers_do_not_fit(config, hardware),
    )


def refuse(rows: list[Row]) -> None:
    """Raise ConfigError with what is red."""
    if bad := [row for row in rows if row.state == "bad"]:
        lines = [f"{row.check} of node {row.node}: {row.found}. {row.todo}" for row in bad]
        raise ConfigError("\n".join([*lines, "`python -m qlora_ray.doctor` with the same arguments shows more."]))


def _why_workers_do_not_fit(config: Config, hardware: Hardware) -> str:
    try:
        check_workers_fit(config, resources_of_a_worker(config, uses_gpu(config, hardware)), hardware)
    except ConfigError as error:
        return str(error)
    return ""


def _traffic(config: Config, base: ModelFacts, hardware: Hardware) -> tuple[Passing | None, float | None]:
    """What passes of the base from host or disk, and bytes a second of it that come from other workers."""
    known = memory.sizes(config, base, base.num_trainable_parameters, zero_stage(config), "bfloat16")
    length, leanest = config.training.max_length, memory.all_layers(known, Keep.HOST)
    num_tokens = config.training.batch_size * tokens_of_a_worker(config, length)
    gpu = gpu_of(hardware)
    speed = memory.tokens_per_second(known, num_tokens, length, leanest, gpu) if known.shares_base else None
    gathered = base_bytes(known, config.ray.max_workers) / (num_tokens / speed) if speed else None
    return offload.passing(known, num_tokens, length, hardware.gpu_gib, gpu), gathered


def _worker_gib(config: Config, base: ModelFacts) -> float:
    """The leanest peak of a worker: layers that keep only their inputs, in host memory."""
    known = memory.sizes(config, base, base.num_trainable_parameters, zero_stage(config), "bfloat16")
    num_tokens = config.training.batch_size * tokens_of_a_worker(config, config.training.max_length)
    return memory.peak_gib(memory.memory_gib(known, num_tokens, memory.all_layers(known, Keep.HOST)))
