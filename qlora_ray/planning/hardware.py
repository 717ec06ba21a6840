"""What the cluster can give, and what of it the workers take."""

from dataclasses import dataclass, field

from qlora_ray.config import Config
from qlora_ray.errors import ConfigError

# Ray's accelerator labels of GPUs without bfloat16 matrix units (compute capability below 8.0).
GPUS_WITHOUT_BFLOAT16 = {"K80", "P4", "P100", "P40", "V100", "T4", "RTX-2080"}


@dataclass(frozen=True)
class Hardware:
    """What the cluster can give: totals over its nodes."""

    num_cpus: float
    num_gpus: float
    accelerator_types: tuple[str, ...] = ()
    other_resources: dict[str, float] = field(default_factory=dict)
    nodes: tuple[dict[str, float], ...] = ()  # resources of each: a worker lives on one
    gpu_gib: float | None = None  # of the smallest GPU, where the nodes were asked


def uses_gpu(config: Config, hardware: Hardware) -> bool:
    """Whether the workers train on GPUs. Raises ConfigError where they shall and there is none."""
    if config.ray.use_gpu is True and hardware.num_gpus == 0:
        raise ConfigError("ray.use_gpu=true: the cluster has no GPU. Use false or auto to train on CPUs.")
    return hardware.num_gpus > 0 if config.ray.use_gpu == "auto" else config.ray.use_gpu


def resources_of_a_worker(config: Config, use_gpu: bool) -> dict[str, float]:
    """Ray resources that one worker holds."""
    return {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {}), **config.ray.resources_per_worker}


def held(hardware: Hardware) -> dict[str, float]:
    """Ray resources of all nodes together."""
    return {**hardware.other_resources, "CPU": hardware.num_cpus, "GPU": hardware.num_gpus}


def check_workers_fit(config: Config, resources: dict[str, float], hardware: Hardware) -> None:
    """Refuse more workers than the cluster can ever hold. Raises ConfigError."""
    n = config.ray.min_workers
    of_all = held(hardware)
    for name, each in resources.items():
        holds = of_all.get(name, 0)
        if n * each > holds:
            fit = int(holds // each)
            way_out = f"Use ray.num_workers={fit}, or ask" if fit else "Ask"
            raise ConfigError(
                f"ray.num_workers={n}: {n} x {each:g} {name} = {n * each:g}, the cluster holds {holds:g}. "
                f"{way_out} for less with ray.resources_per_worker."
            )
    fit = sum(_fit(node, resources) for node in hardware.nodes)
    if hardware.nodes and fit < n:
        raise ConfigError(
            f"ray.num_workers={n}: a worker needs {resources} on one node, and the {len(hardware.nodes)} nodes hold "
            f"{fit} such workers. Use ray.num_workers={fit}, or ask for less with ray.resources_per_worker."
        )


def most_workers(config: Config, resources: dict[str, float], hardware: Hardware) -> int:
    """Of those that are asked for, as many as one machine holds, in whole groups."""
    size = config.training.sequence_parallel
    return min(config.ray.max_workers, _fit(held(hardware), resources)) // size * size


def fewest_of_a_node(num_workers: int, resources: dict[str, float], hardware: Hardware) -> int:
    """Workers of the node that gets fewest of them, where Ray fills one node after the other."""
    left = fewest = num_workers
    for fit in sorted((_fit(node, resources) for node in hardware.nodes), reverse=True):
        here = min(fit, left)
        if here:
            left, fewest = left - here, min(fewest, here)
    return fewest


def _fit(node: dict[str, float], resources: dict[str, float]) -> int:
    return min(int(node.get(name, 0) // each) for name, each in resources.items() if each)


def compute_dtype_of(config: Config, use_gpu: bool, hardware: Hardware) -> str:
    """dtype of activations and products: as asked, else what the workers compute fastest in."""
    if config.quantization.compute_dtype != "auto":
        return config.quantization.compute_dtype
    if not use_gpu:
        return "float32"
    old = set(hardware.accelerator_types) & GPUS_WITHOUT_BFLOAT16
    return "float16" if old else "bfloat16"
