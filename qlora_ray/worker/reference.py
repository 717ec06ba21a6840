"""Log-probabilities of the reference model: computed once, before the first step, and kept in the cache.

cache/reference-<fingerprint>/log_probabilities.safetensors    train, validation: float32, by the answers' places

The reference is the base (the adapter switched off) or the adapter that the run was started from. Its values are those
of fixed batches, so they depend neither on the number of workers nor on the order of training; a resumed run and other
runs on the same rows read them.
"""

import contextlib
import hashlib
import json

import safetensors.torch
import torch

from qlora_ray.data.rows import Rows, open_rows
from qlora_ray.model.record import describe_base
from qlora_ray.model.start import WEIGHTS
from qlora_ray.rundir import names
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.export import names_in_file
from qlora_ray.worker.loss import log_probabilities
from qlora_ray.worker.messages import Referring, Run
from qlora_ray.worker.preference import Preference
from qlora_ray.worker.rounds import num_rounds, rounds
from qlora_ray.worker.watchdog import Watchdog
from qlora_ray.worker.worker import Worker

SPLITS = ("train", "validation")
FILE = "log_probabilities.safetensors"


def preferences(worker: Worker, watchdog: Watchdog, step: int) -> dict[str, Preference]:
    """By split: what is asked of its pairs, with the reference's log-probabilities. Every worker must call this.

    `step`: optimizer steps done before, after which the adapter is no longer the one that the run was started from.
    """
    training = worker.run.config.training
    found = _of_cache(worker, watchdog, step) if training.has_reference else {}
    on_device = {split: values.to(worker.device) for split, values in found.items()}
    return {split: Preference(training, on_device.get(split)) for split in SPLITS}


def fingerprint(run: Run, device: str) -> str:
    """Hex digest (32 digits) over what decides the reference's log-probabilities."""
    config, plan = run.config, run.plan
    manifest = json.loads((run.folder / names.MANIFEST).read_bytes())
    start = manifest["start_from"]["sha256"] if config.starts_as_reference else None
    parts = (
        run.rows.name, describe_base(config.model)["sample_sha256"], config.quantization.model_dump(),
        plan.compute_dtype, plan.micro_batch_size, start, device,
        *([config.model.rope_scaling] if config.model.rope_scaling else []),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def compute(worker: Worker, split: str, watchdog: Watchdog, adapter_on: bool) -> torch.Tensor:
    """The log-probability of each answer of a split under the model as it is, by place. Every worker must call this."""
    rows, engine, team = open_rows(worker.run.rows, split), worker.engine, worker.team
    batch_size = worker.run.plan.micro_batch_size
    total = num_rounds(rows, batch_size, worker.seat)
    mine: list[tuple[list[int], list[float]]] = []
    engine.train(False)
    with torch.no_grad(), contextlib.nullcontext() if adapter_on else engine.module.disable_adapter():
        for number, (table, counts) in enumerate(rounds(rows, batch_size, worker.seat)):
            with watchdog.phase("reference", worker.run.config.watchdog.step_seconds):
                batch = to_tensors(table, worker.tokenizer.pad_token_id, worker.device)
                values, _ = log_probabilities(engine.module, batch)
                if counts:
                    mine.append((batch["places"].tolist(), values.tolist()))
            team.tell(Referring(split, number + 1, total))
    engine.train()
    return _by_place(rows, [pair for of_worker in team.gather(mine) for pair in of_worker])


def _by_place(rows: Rows, found: list[tuple[list[int], list[float]]]) -> torch.Tensor:
    values = torch.full((int(rows.num_samples.sum()),), torch.nan)
    for places, of_places in found:
        values[places] = torch.tensor(of_places)
    assert not values.isnan().any(), "an answer has no reference"
    return values


def _of_cache(worker: Worker, watchdog: Watchdog, step: int) -> dict[str, torch.Tensor]:
    run, team = worker.run, worker.team
    file = run.rows.parent / f"reference-{fingerprint(run, worker.device.type)}" / FILE
    if team.gather(file.exists())[0]:  # the first worker decides: another may see it a moment earlier
        return safetensors.torch.load(file.read_bytes())
    is_start = run.config.starts_as_reference
    with _start_weights(worker) if is_start and step else contextlib.nullcontext():
        found = {split: compute(worker, split, watchdog, adapter_on=is_start) for split in SPLITS}
    if team.rank == 0:
        file.write_bytes(safetensors.torch.save(found))
    return found


def _start_weights(worker: Worker) -> contextlib.AbstractContextManager[None]:
    """Within, the adapter is the one that the run was started from. Every worker must call this."""
    stored = safetensors.torch.load((worker.run.folder / names.START_FROM / WEIGHTS).read_bytes())
    in_file = names_in_file(worker.engine.module, worker.engine.weights())
    return worker.engine.with_weights({name: stored[saved] for name, saved in in_file.items()})
