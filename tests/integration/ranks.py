"""Workers of sharded runs, each a process of its own on gloo, without Ray: their own set-up, what they hold and learn.

They are forks of one process that has imported what takes seconds to import, and has done nothing else.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Job:
    """What the workers do."""

    base: str
    sections: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 2
    is_loaded_whole: bool = False  # by each worker, before ZeRO takes it apart
    place: str = ""  # of run and cache, where jobs share it
    takes_as_long: bool = False  # the rows: by slices of 16 tokens, with attention parked
    rows: list[list[int]] = dataclasses.field(default_factory=list)  # lengths of the samples of each; []: a batch's two
    num_nodes: int = 1  # that the workers seem to live on
    resumes_at: int = 0  # the step before which all is built anew
    fault: str = (
        ""  # "flip": the last worker holds a wrong byte of each weight; "cast": all hold packed bytes as numbers
    )


@dataclass(frozen=True)
class Held:
    """What a worker tells."""

    shares: dict[str, str] = dataclasses.field(default_factory=dict)  # digest of each, without padding
    scales: dict[str, str] = dataclasses.field(default_factory=dict)
    persistent: list[str] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    adapter: str = ""  # digest
    bytes_read: int = 0
    gradient: str = ""  # the file of the first step's
    eval_loss: float = 0.0
    error: str = ""


class Team:
    """The workers as seen by one of them."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def tell(self, message: Any) -> None:
        pass

    def sum(self, *values: float) -> list[float]:
        return [sum(of_worker) for of_worker in zip(*self.gather(values), strict=True)]

    def gather(self, value: Any) -> list[Any]:
        gathered = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered


def run(size: int, folder: Path, *jobs: Job) -> list[list[Held]]:
    """Run the jobs on so many workers, one after the other; what each left, by worker."""
    by_worker = run_each(be_one, size, folder, jobs)
    return [[Held(**held) for held in of_job] for of_job in zip(*by_worker, strict=True)]


def run_each(be_one: Callable, size: int, folder: Path, *more: Any) -> list[Any]:
    """What `be_one`, called with folder, rank, size and more in a process each, leaves in <rank>.json."""
    folder.mkdir(parents=True)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.integration.engines", "qlora_ray.worker.evaluate"])
    workers = [forks.Process(target=_speak_to_log, args=(be_one, folder, rank, size, *more)) for rank in range(size)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 500
    try:
        while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
            assert time.monotonic() < deadline, (folder / "0.log").read_text()[-3000:]
            time.sleep(0.02)
        failed = [rank for rank, worker in enumerate(workers) if worker.exitcode]
    finally:
        for worker in workers:
            worker.kill()  # one whose other has failed would wait for it
    assert not failed, (folder / f"{failed[0]}.log").read_text()[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _speak_to_log(be_one: Callable, folder: Path, rank: int, *more: Any) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    be_one(folder, rank, *more)


def digest(*tensors: torch.Tensor | None) -> str:
    """Of the bytes of some tensors."""
    parts = (one.detach().contiguous().view(-1).view(torch.uint8).numpy() for one in tensors if one is not None)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]


def work(folder: Path, job: Job) -> Held:
    """Set up as a worker does, and take steps."""
    from qlora_ray.errors import QloraRayError
    from qlora_ray.model.apart import Apart
    from qlora_ray.planning.memory import begins_whole
    from qlora_ray.worker import base
    from tests.integration import engines, tiny_models

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ["NODE_RANK"] = str(rank * job.num_nodes // size)
    base.begins_whole = (lambda *_: True) if job.is_loaded_whole else begins_whole
    keep = Apart.keep

    def keep_it(self, parameter, share):
        if job.fault == "flip" and rank == size - 1:
            share.view(torch.uint8)[0] ^= 1
        if job.fault == "cast":
            share = share.to(torch.bfloat16)
        keep(self, parameter, share)

    Apart.keep = keep_it  # type: ignore[method-assign]
    config = tiny_models.make_config(job.base, **job.sections, ray={"num_workers": size})
    if job.rows:
        return train_on_rows(folder, job, config)
    reads.clear()
    try:
        engine = engines.build(config, folder)
    except QloraRayError as error:
        return Held(error=str(error))
    finally:
        Apart.keep = keep  # type: ignore[method-assign]
    bytes_read = sum(reads)
    (shares, scales), persistent = passing(engine), []
    for name, parameter in engine.module.named_parameters():
        share = getattr(parameter, "ds_tensor", None)
        if "lora" in name or share is None:
            continue
        place = parameter.ds_zero_partition_rank
        held = max(0, min(share.numel(), parameter.ds_numel - place * share.numel()))
        shares[name] = f"{share.dtype} {tuple(parameter.ds_shape)} {share.numel()} {digest(share[:held])}"
        persistent += [name] * parameter.ds_persist
        if hasattr(parameter, "quant_state"):
            scales[name] = of_scales(parameter.quant_state)
    losses = engines.train(engine, range(job.resumes_at))
    if job.resumes_at:
        engine = engines.build(config, folder / "again", resumed=engine.state())
    losses += engines.train(engine, range(job.resumes_at, job.steps))
    return Held(shares, scales, persistent, losses, digest(*engine.state().weights.values()), bytes_read)


def passing(engine: Any) -> tuple[dict[str, str], dict[str, str]]:
    """What this worker holds of each fused layer's slab, and the scales in it, where workers share the base."""
    shares: dict[str, str] = {}
    scales: dict[str, str] = {}
    ring = engine._ring
    for number, slab in enumerate((ring.ends.slabs if ring.ends else []) if ring else []):
        part = ring._copies.stretches[id(slab)]
        shares[f"end {number}"] = f"{part.numel()} {digest(part)}"
    for number, slab in enumerate(ring.slabs if ring else ()):
        part = ring._copies.stretches[id(slab)]
        shares[f"layer {number}"] = f"{part.numel()} {digest(part)}"
        for path, module in slab.layer.named_modules():
            for name, parameter in vars(module).items():
                if isinstance(parameter, torch.nn.Parameter) and hasattr(parameter, "quant_state"):
                    ring.bring(parameter)
                    scales[f"layer {number}.{path}.{name}"] = of_scales(parameter.quant_state)
    return shares, scales


def of_scales(state: Any) -> str:
    """What tells those of one weight from others."""
    values = digest(state.absmax, state.code, state.offset, state.state2.absmax if state.nested else None)
    return f"{state.dtype} {tuple(state.shape)} {state.blocksize} {state.quant_type} {values}"


def train_on_rows(folder: Path, job: Job, config: Any) -> Held:
    """Take steps on rows of random samples, as the loop takes them, with matrices B that do not begin as zeros."""
    from qlora_ray.data.delivery import Stream
    from qlora_ray.data.order import Order
    from qlora_ray.data.rows import open_rows
    from qlora_ray.model import slices
    from qlora_ray.model.adapter import add_adapter, trainable
    from qlora_ray.model.fused import fused_layers
    from qlora_ray.model.fused import keep as keep_of
    from qlora_ray.model.recompute import LONG_ROW, SLICE_ROWS, Choice, Keep
    from qlora_ray.worker import setup
    from qlora_ray.worker.evaluate import validation_loss
    from qlora_ray.worker.loop import optimizer_step
    from qlora_ray.worker.metrics import RowCounts
    from qlora_ray.worker.micro_batches import MicroBatches
    from qlora_ray.worker.seat import seat_of
    from qlora_ray.worker.stopwatch import Stopwatch
    from qlora_ray.worker.worker import Worker
    from tests.integration import engines
    from tests.made_rows import make_random_entry

    def add_begun(*given):
        adapted, generator = add_adapter(*given), torch.Generator().manual_seed(1)
        for name, parameter in trainable(adapted).items():
            if "lora_B" in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        return adapted

    rows = make_random_entry(folder / "cache", job.rows, packed=config.training.packing)
    run, team, device = engines.run_of(config, folder, rows), Team(), torch.device("cpu")
    setup.add_adapter = add_begun  # type: ignore[assignment]
    engine = setup.build_engine(run, team, device, 0, None)  # type: ignore[arg-type]
    setup.add_adapter = add_adapter
    slices.LONG_ROW, slices.SLICE_ROWS = (8, 16) if job.takes_as_long else (LONG_ROW, SLICE_ROWS)
    if job.takes_as_long:
        keep_of(engine.module, Choice((Keep.PARKED,) * len(fused_layers(engine.module))))
    order = Order(len(open_rows(rows, "train")), 0, run.plan.micro_batch_size, run.plan.micro_batches_per_step)
    counts, seat = RowCounts(rows, order), seat_of(team.rank, team.size, config.training.sequence_parallel)
    stream = Stream(rows, order, seat.group, seat.num_groups, 0, job.steps)
    micro_batches = MicroBatches(stream, seat, config.training.seed, 0, device)
    gradients, losses, take = [], [], engine._sum.take

    def take_and_note() -> torch.Tensor:
        whole = take()
        gradients.append(whole.clone())
        return whole

    engine._sum.take = take_and_note  # type: ignore[method-assign]
    worker = Worker(run, team, engine, _Pads, device, None, None)  # type: ignore[arg-type]
    eval_loss = validation_loss(worker)["eval_loss"]
    for step in range(job.steps):
        count = counts.label_tokens(step)
        sums, _ = optimizer_step(engine, micro_batches.of_step(step), count, 1e-2, Stopwatch(device))
        losses.append(sum(team.sum(*(float(one) for one in sums))) / count)
    torch.save(gradients[0], folder / "gradient.pt")
    adapter = digest(*engine.state().weights.values())
    return Held(losses=losses, adapter=adapter, gradient=str(folder / "gradient.pt"), eval_loss=eval_loss)


class _Pads:
    pad_token_id = 0


reads: list[int] = []  # bytes of each read of a tensor


def be_one(folder: Path, rank: int, size: int, jobs: tuple[Job, ...]) -> None:
    """Do all jobs on one process group, and write what each left."""
    from deepspeed.accelerator import get_accelerator

    from qlora_ray.model import pieces
    from tests.integration import engines

    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK="0", RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    engines.Alone = Team  # type: ignore[misc, assignment]
    # DeepSpeed refuses float16 on CPUs, where PyTorch computes with it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    read_bytes = pieces.read_bytes

    def counting(name, entry, start, stop):
        reads.append(stop - start)
        return read_bytes(name, entry, start, stop)

    pieces.read_bytes = counting
    left = [work(folder / f"{job.place or number}.{rank}", job) for number, job in enumerate(jobs)]
    (folder / f"{rank}.json").write_text(json.dumps([vars(held) for held in left]))
