"""The one harness for sharded models in this process: a worker's own set-up and step, without Ray, in a team of one."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from qlora_ray.config import Config
from qlora_ray.data.rows import find
from qlora_ray.data.tokenize import IGNORE_INDEX, Sample
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import Plan, make_plan
from qlora_ray.storage import Folder, open_folder
from qlora_ray.worker import setup
from qlora_ray.worker.engine import Engine
from qlora_ray.worker.loop import optimizer_step
from qlora_ray.worker.loss import num_label_tokens
from qlora_ray.worker.messages import Run
from qlora_ray.worker.micro_batches import MicroBatch, seed_everything
from qlora_ray.worker.state import AdapterState
from qlora_ray.worker.stopwatch import Stopwatch
from tests.integration import tiny_models
from tests.made_rows import make_entry


class Alone:
    """A team of one, which keeps what it tells."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.told: list[Any] = []

    def tell(self, message: Any) -> None:
        self.told.append(message)

    def gather(self, value: Any) -> list[Any]:
        return [value]


def rows_of_batch(folder: Path) -> Folder:
    """A cache entry of the rows of `tiny_models.batch`, one sample each."""
    batch = tiny_models.batch()
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    samples = [Sample(ids, [(labels.count(IGNORE_INDEX), len(ids))], False) for ids, labels in rows]
    return make_entry(folder, samples, [[number] for number in range(len(samples))], packed=False)


def plan_of(config: Config, rows: Folder, device: str = "cpu", deepspeed_json: dict | None = None) -> Plan:
    """What the driver would plan on a CPU core a worker, or on one GPU: float16 only there, though CPUs have it too."""
    on_cpu = device == "cpu" and config.quantization.compute_dtype != "float16"
    hardware = Hardware(num_cpus=config.ray.max_workers, num_gpus=0 if on_cpu else config.ray.max_workers)
    stats = find(rows)
    assert stats is not None
    return make_plan(config, stats, exact_facts(config), hardware, deepspeed_json)


def run_of(
    config: Config, folder: Path, rows: Folder, device: str = "cpu", deepspeed_json: dict | None = None
) -> Run:  # fmt: skip
    """What the driver would give the workers."""
    plan = plan_of(config, rows, device, deepspeed_json)
    return Run(config, plan, open_folder(str(folder / "run")), rows, "", debug=False)


def build(
    config: Config, folder: Path, resumed: AdapterState | None = None, device: str = "cpu",
    deepspeed_json: dict | None = None,
) -> Engine:  # fmt: skip
    """What a worker trains with; `folder` is for the run directory and the rows."""
    run = run_of(config, folder, rows_of_batch(folder / "cache"), device, deepspeed_json)
    return setup.build_engine(run, Alone(), torch.device(device), pad_token_id=0, resumed=resumed)  # type: ignore[arg-type]


def train(
    engine: Engine, steps: Iterable[int], learning_rate: float = 1e-2, fixed: bool = True,
    batch: Callable[[int], dict[str, torch.Tensor]] = tiny_models.batch,
) -> list[float]:  # fmt: skip
    """Optimizer steps on one batch, or on another each; returns the mean nats per token of each."""
    losses, device = [], next(engine.module.parameters()).device
    for step in steps:
        rows = {name: values.to(device) for name, values in batch(0 if fixed else step).items()}
        seed_everything(0, step, 0)
        count = int(num_label_tokens(rows))
        micro_batches = [MicroBatch(rows, num_present=1, counts=True)]
        (nats,), _ = optimizer_step(engine, micro_batches, count, learning_rate, Stopwatch(device))
        losses.append(float(nats) / count)
    return losses
