"""Weights that lie on the host or on a disk: what is asked for, what it takes, and what a micro-batch moves. Pure."""

from dataclasses import dataclass
from typing import Any

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError
from qlora_ray.model.recompute import Keep
from qlora_ray.planning import memory
from qlora_ray.planning.memory import GIB, NUM_SLOTS, Sizes

SECTION = "zero_optimization.offload_param"
ROOM_ON_DISK = 1.05  # of the bytes that pass: each tensor begins at a border


@dataclass(frozen=True)
class Passing:
    """What the layers' weights take and move, where they do not stay on the GPU."""

    num_layers: int
    num_resident: int  # of the last layers, where the GPU's size is known
    slab_bytes: float  # of a layer
    host_bytes: float  # of each worker
    disk_bytes: float  # of each worker
    moved_bytes: float  # to the GPU, each micro-batch
    seconds: float | None  # that a micro-batch computes, where that is known

    @property
    def bytes_per_second(self) -> float | None:
        """That hide behind the products; None where their time is not known."""
        return self.moved_bytes / self.seconds if self.seconds else None

    def __str__(self) -> str:
        kept = f", the last {self.num_resident} stay on the GPU" if self.num_resident else ""
        text = (
            f"{self.num_layers} layers of {self.slab_bytes / 1e6:,.0f} MB{kept}; {self.host_bytes / GIB:.2f} GiB of "
            f"host memory{f' and {self.disk_bytes / GIB:.2f} of disk' if self.disk_bytes else ''} a worker; "
            f"{self.moved_bytes / 1e9:,.1f} GB to the GPU each micro-batch"
        )
        if self.bytes_per_second is not None:
            needed = self.bytes_per_second / 1e9
            text += f", behind about {self.seconds:.2f} s of products from {needed:,.1f} GB/s on"
        return text


def passing(known: Sizes, num_tokens: int, length: int, gpu_gib: float | None, gpu: str) -> Passing | None:
    """What passes of a base of these sizes, for micro-batches of so many tokens; None where all stays on the GPU."""
    if known.offload == "none":
        return None
    leanest = memory.all_layers(known, Keep.HOST)
    num_layers, slab = max(1, known.base.num_layers), memory.slab_bytes(known)
    num_resident = 0
    if gpu_gib is not None:
        room = memory.SHARE_OF_MEMORY * gpu_gib - memory.peak_gib(memory.memory_gib(known, num_tokens, leanest))
        num_resident = max(0, min(num_layers, int(room * GIB // slab)))
    count, on_disk = num_layers - num_resident, known.offload == "nvme"
    speed = memory.tokens_per_second(known, num_tokens, length, leanest, gpu)
    return Passing(
        num_layers, num_resident, slab,
        host_bytes=NUM_SLOTS * slab if on_disk else num_layers * slab,
        disk_bytes=num_layers * slab * ROOM_ON_DISK if on_disk else 0.0,
        moved_bytes=2 * max(0, count - NUM_SLOTS) * slab, seconds=num_tokens / speed if speed else None,
    )  # fmt: skip


def taken_from_json(config: Config, deepspeed_json: dict[str, Any] | None) -> Config:
    """The config with what a DeepSpeed JSON says of offloaded parameters, which the YAML must not contradict.

    Raises ConfigError.
    """
    asked = section_of(deepspeed_json)
    ours, told = config.deepspeed, {}
    for name, key in (("offload_params", "device"), ("nvme_path", "nvme_path")):
        value = asked.get(key, "auto")
        if value == "auto":
            continue
        if name in ours.model_fields_set and getattr(ours, name) != value:
            raise ConfigError(
                f"{SECTION}.{key}={value} in the DeepSpeed JSON contradicts deepspeed.{name}={getattr(ours, name)}. "
                'Write "auto" there, or leave the setting out of the YAML.'
            )
        told[name] = value
    if told.get("offload_params", "none") not in ("none", "cpu", "nvme"):
        raise ConfigError(
            f"{SECTION}.device={told['offload_params']} in the DeepSpeed JSON: must be none, cpu or nvme."
        )
    return config.model_copy(update={"deepspeed": ours.model_copy(update=told)}) if told else config


def section_of(deepspeed_json: dict[str, Any] | None) -> dict[str, Any]:
    """What a DeepSpeed JSON says of offloaded parameters."""
    zero = (deepspeed_json or {}).get("zero_optimization")
    section = zero.get("offload_param") if isinstance(zero, dict) else None
    return section if isinstance(section, dict) else {}


def notes(deepspeed_json: dict[str, Any] | None) -> list[str]:
    """What of it means nothing here."""
    unused = sorted(set(section_of(deepspeed_json)) - {"device", "nvme_path"})
    return [f"{SECTION}.{', '.join(unused)} in the DeepSpeed JSON: not used, weights pass in layers."] if unused else []


def refuse(config: Config, stage: int) -> None:
    """Raise ConfigError where weights cannot be offloaded as the settings ask for it."""
    ds = config.deepspeed
    key = f"deepspeed.offload_params={ds.offload_params}"
    if ds.offload_params == "none":
        if ds.nvme_path is not None:
            raise ConfigError(f"deepspeed.nvme_path={ds.nvme_path}: needs deepspeed.offload_params=nvme.")
        return
    if stage != 3:
        raise ConfigError(f"{key}: needs zero_stage 3, the stage is {stage}. Set deepspeed.zero_stage=3.")
    if (ds.offload_params == "nvme") != (ds.nvme_path is not None):
        way_out = "Set deepspeed.nvme_path to a folder on a local disk." if ds.nvme_path is None else "Use nvme."
        raise ConfigError(f"{key}: deepspeed.nvme_path is {ds.nvme_path or 'not set'}. {way_out}")
    if ds.share_base in ("node", "world"):
        raise ConfigError(
            f"deepspeed.share_base={ds.share_base}: with {key} each worker keeps all of the base. Leave it out."
        )
    if memory.begins_whole(config):
        raise ConfigError(
            f"{key}: model.lora_variant={config.model.lora_variant} begins from whole weights on the GPU. Use lora."
        )
