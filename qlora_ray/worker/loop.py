"""The training loop: one verb a line, from the newest checkpoint to the adapter."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray.train
import ray.train.torch
import torch

from qlora_ray.config import Config, ConfigError
from qlora_ray.data.delivery import Stream, deliver
from qlora_ray.data.order import Order
from qlora_ray.plan import Plan, learning_rate_at
from qlora_ray.storage import FREE_SPACE, Folder, unless_full
from qlora_ray.worker import checkpoint, evaluate, export, setup
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.engine import Engine
from qlora_ray.worker.loss import sum_of_nats
from qlora_ray.worker.metrics import Meter, MetricsFile, RowCounts
from qlora_ray.worker.stopwatch import Stopwatch
from qlora_ray.worker.team import Team
from qlora_ray.worker.watchdog import Watchdog

MAX_FAILED_CHECKPOINTS = 3  # in a row, for want of space


@dataclass(frozen=True)
class State:
    """What has happened; replaced each step, and kept in checkpoints."""

    step: int = 0  # optimizer steps done: the data cursor
    num_tokens: int = 0
    num_label_tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_eval_step: int | None = None
    evaluations_without_improvement: int = 0
    num_skipped_steps: int = 0  # whose gradient was not finite
    num_skipped_in_a_row: int = 0


class Stop(RuntimeError):
    """A failure that trying again cannot mend, met by every worker at the same place; the message is the reason."""


def run(
    config: Config, plan: Plan, run_folder: Folder, rows: Folder, fingerprint: str, channel: Any, debug: bool
) -> None:
    """Train from the newest checkpoint to the end of the plan, or to where the driver asks to stop."""
    team = Team(channel)
    log_folder = setup.send_output_to_log(run_folder, team.rank, debug)
    watchdog = Watchdog(config.watchdog, log_folder, team.rank)
    try:
        if reason := team.reason_to_give_up():
            raise Stop(reason)
        setup.check_shared(run_folder, team)
        _train(config, plan, run_folder, rows, fingerprint, team, watchdog, debug)
    except ConfigError as refusal:  # the same on every worker: trying again would not help
        team.tell(kind="refused", message=str(refusal))
        team.wait_until_told()
    except (Stop, setup.GuardError) as error:
        team.tell(kind="fatal", message=str(error))
        team.wait_until_told()
    except torch.OutOfMemoryError as error:  # on this worker alone: its death ends the others
        team.tell_from_any_rank(kind="fatal", message=setup.out_of_memory_message(config, plan, team.rank, error))
        raise


def _train(
    config: Config, plan: Plan, run_folder: Folder, rows: Folder, fingerprint: str, team: Team, watchdog: Watchdog,
    debug: bool,
) -> None:  # fmt: skip
    began = time.perf_counter()
    with watchdog.phase("load"):
        resumed = checkpoint.load_latest(run_folder, set_aside=team.rank == 0)
        state = State(**resumed[1]["state"]) if resumed else State()
        order = Order(setup.num_rows(rows), config.training.seed, plan.micro_batch_size, plan.micro_batches_per_step)
        batches = _Batches(Stream(rows, order, team.rank, team.size, state.step, plan.num_steps))
        device = ray.train.torch.get_device()
        setup.choose_kernels(config, device)
        tokenizer = setup.tokenizer_of(config, rows)
        engine = setup.build_engine(
            config, plan, rows, device, tokenizer.pad_token_id, resumed and resumed[0], team, debug
        )
        counts = RowCounts(rows, order)
        writer = MetricsFile(run_folder, state.step) if team.rank == 0 else None
        meter = Meter(team, counts, writer, device)
        engine.time_gathers(meter.stopwatch)
    broken = resumed[2] if resumed else []
    team.tell(kind="ready", step=state.step, seconds=time.perf_counter() - began, broken=broken)
    saver, deadline = _Saver(config, engine, run_folder, fingerprint, team), watchdog.deadline("step")
    stopping = early = False
    while state.step < plan.num_steps and not (stopping or early):
        with watchdog.phase("step", deadline):
            learning_rate = learning_rate_at(state.step, plan, config)
            nats, is_finite = optimizer_step(
                engine, batches, counts.label_tokens(state.step), state.step, learning_rate, config, plan, device,
                tokenizer.pad_token_id, team, meter.stopwatch,
            )  # fmt: skip
            state = replace(state, step=state.step + 1)
            meter.add(state.step, nats)
            state = _count_skipped(state, is_finite, config, counts, writer, team)
            orders = team.agree(
                state.step, watchdog.deadline("step"), watchdog.longest("step") + watchdog.longest("save")
            )
            stopping, deadline = orders.stop, orders.deadline
            last = state.step == plan.num_steps or stopping
            if state.step == 1 or state.step % config.logging.every_steps == 0 or last:
                state = _log(state, meter, engine, learning_rate, order)
        if plan.eval_every_steps and (state.step % plan.eval_every_steps == 0 or state.step == plan.num_steps):
            with watchdog.phase("evaluate"):
                state = _validate(state, config, plan, engine, rows, run_folder, device, tokenizer, writer, saver, team)
            early = _is_patience_over(state, config)
            meter.skip_time("evaluation")
        ordered = orders.save or orders.hold_until
        if state.step % plan.checkpoint_every_steps == 0 or last or early or ordered:
            with watchdog.phase("save"):
                saver.save(state)
                if ordered:
                    saver.finish()
            if orders.hold_until and not last:
                team.tell(kind="holding")
                _wait_for_the_end(orders.hold_until)
            meter.skip_time("checkpoint")
    with watchdog.phase("save"):
        saver.finish()
        if writer:
            writer.flush()
        saver.save_last(_adapter_writer("adapter", config, plan, engine, run_folder, tokenizer, vars(state)))
    with watchdog.phase("evaluate"):
        answers = {} if stopping else evaluate.compare_answers(config, engine, rows, tokenizer, device, team)
    team.tell(kind="done", status="interrupted" if stopping else "done", early=early, **vars(state), **answers)
    team.wait_until_told()


def optimizer_step(
    engine: Engine,
    batches: "_Batches",
    num_label_tokens: int,
    step: int,
    learning_rate: float,
    config: Config,
    plan: Plan,
    device: torch.device,
    pad_token_id: int,
    team: Team,
    stopwatch: Stopwatch,
) -> tuple[list[torch.Tensor], bool]:
    """One update from the gradient of: nats over all unmasked tokens of the global batch / their number.

    Returns the sum of nats of each of this worker's micro-batches, scalars on the device, and whether the gradient was
    finite: if not, nothing was changed.
    """
    each: list[torch.Tensor] = []
    stopwatch.start()
    for first in range(0, plan.micro_batches_per_step, team.size):
        num_present = min(team.size, plan.micro_batches_per_step - first)
        if team.rank < num_present:
            micro_batch, rows = batches.next(step)
            batch = to_tensors(rows, pad_token_id, device)
        # Else the last one again, which then does not count: ZeRO-3's forward is a collective.
        setup.seed_everything(config.training.seed, step, micro_batch)
        stopwatch.mark("data")
        nats = sum_of_nats(engine, batch)
        stopwatch.mark("forward")
        engine.backward(nats / num_label_tokens)
        stopwatch.mark("backward")
        engine.add_up(num_present)
        stopwatch.mark("communication")
        if team.rank < num_present:
            each.append(nats.detach())
    is_finite = engine.step(learning_rate)
    stopwatch.mark("optimizer")
    return each, is_finite


class _Batches:
    """The next micro-batch, fetched while the model still loads or computes."""

    def __init__(self, stream: Stream):
        self._tables = deliver(stream)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = self._thread.submit(next, self._tables, None)

    def next(self, step: int) -> tuple[int, Any]:
        """(micro-batch number, rows) of the next micro-batch, which must belong to this step."""
        table = self._next.result(timeout=setup.DATA_TIMEOUT_SECONDS)
        self._next = self._thread.submit(next, self._tables, None)
        assert table is not None and table["step"][0].as_py() == step, "the delivered rows are not those of this step"
        return table["micro_batch"][0].as_py(), table


def _log(state: State, meter: Meter, engine: Engine, learning_rate: float, order: Order) -> State:
    entry = meter.log(
        learning_rate=learning_rate, grad_norm=engine.grad_norm(), epoch=state.step / order.steps_per_epoch
    )
    loss = entry.get("loss", state.last_loss)
    first = loss if state.first_loss is None else state.first_loss
    return replace(state, first_loss=first, last_loss=loss, num_tokens=state.num_tokens + entry["num_tokens"],
                   num_label_tokens=state.num_label_tokens + entry["num_label_tokens"])  # fmt: skip


def _count_skipped(state: State, is_finite: bool, config: Config, counts: RowCounts, writer, team: Team) -> State:
    """Note a step that was skipped, with its samples; raises Stop after too many in a row."""
    if is_finite:
        return replace(state, num_skipped_in_a_row=0)
    state = replace(
        state, num_skipped_steps=state.num_skipped_steps + 1, num_skipped_in_a_row=state.num_skipped_in_a_row + 1
    )
    samples = counts.sample_numbers(state.step - 1)
    if writer:
        writer.write(step=state.step, skipped=True, samples=samples)
    named = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    team.tell(kind="warning", message=f"Step {state.step:,} was skipped: its gradient is not finite. Samples {named}.")
    if state.num_skipped_in_a_row >= config.training.max_skipped_steps:
        raise Stop(
            f"the gradients of {state.num_skipped_in_a_row} steps in a row, up to step {state.step:,}, are not finite: "
            "they never reached the weights, and the last checkpoint is good. Lower training.learning_rate, or look "
            "at the samples that metrics.jsonl names."
        )
    return state


def _validate(state, config, plan, engine, rows, run_folder, device, tokenizer, writer, saver, team) -> State:
    metrics = evaluate.validation_loss(engine, rows, config.training.batch_size, tokenizer.pad_token_id, device, team)
    improved = state.best_eval_loss is None or metrics["eval_loss"] < state.best_eval_loss
    if improved:
        known = {**vars(state), **metrics}
        write = _adapter_writer("adapter_best", config, plan, engine, run_folder, tokenizer, known)
        if team.rank == 0:
            saver.save_best(write)
    if writer:
        writer.write(step=state.step, **metrics)
    samples = evaluate.sample_answers(config, engine, rows, tokenizer, device, team)
    team.tell(kind="evaluated", step=state.step, samples=samples, **metrics)
    ray.train.report({"step": state.step, "loss": state.last_loss, **metrics})
    return replace(
        state,
        eval_loss=metrics["eval_loss"],
        best_eval_loss=metrics["eval_loss"] if improved else state.best_eval_loss,
        best_eval_step=state.step if improved else state.best_eval_step,
        evaluations_without_improvement=0 if improved else state.evaluations_without_improvement + 1,
    )


def _adapter_writer(name, config, plan, engine, run_folder, tokenizer, state) -> Callable[[], None]:
    """What writes the adapter of now, whenever it is called. Every worker must call this; rank 0 may use it."""
    weights = engine.weights()

    def write() -> None:
        about = export.about(config, plan, run_folder, state)
        export.write_adapter(run_folder / name, engine.module, weights, tokenizer, plan.compute_dtype, about)

    return write


def _wait_for_the_end(until: float) -> None:
    """Do nothing until Ray Train ends this worker group: what would be computed now would be lost."""
    while time.time() < until:
        time.sleep(0.1)


def _is_patience_over(state: State, config: Config) -> bool:
    patience = config.training.early_stopping_patience
    return patience is not None and state.evaluations_without_improvement >= patience


class _Saver:
    """What a run writes beside its metrics. A full disk costs a checkpoint, not the run.

    Checkpoints are gathered by all workers and written by rank 0 beside the next steps. No checkpoint is newer than a
    best adapter that found no space: a run that goes on from it would not write that one again.
    """

    def __init__(self, config: Config, engine: Engine, run_folder: Folder, fingerprint: str, team: Team):
        self._config, self._engine, self._fingerprint, self._team = config, engine, fingerprint, team
        self._run = run_folder
        self._writer = checkpoint.Saver(run_folder, config.checkpoint.keep)
        self._best: Callable[[], None] | None = None  # writes the best adapter, where that is still to be done
        self._problem: str | None = None  # why the last checkpoint was not begun
        self._failures = 0

    def save_best(self, write: Callable[[], None]) -> None:
        """Write the best adapter now, or where the disk is full before the next checkpoint. For rank 0."""
        self._best = write
        if problem := self._write_best():
            self._team.tell(kind="warning", message=f"{problem}. It will be written before the next checkpoint.")

    def save(self, state: State) -> None:
        """Begin a checkpoint, once the one before is on disk. Every worker must call this."""
        self._wait(MAX_FAILED_CHECKPOINTS)
        whole = self._engine.state()
        if self._team.rank == 0:
            self._problem = self._write_best()
            if not self._problem:
                seed = self._config.training.seed
                self._writer.begin(
                    whole, {"step": state.step, "state": vars(state), "fingerprint": self._fingerprint, "seed": seed}
                )

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Every worker must call this. Raises Stop where it cannot be."""
        self._wait(max_failures=1)

    def save_last(self, write: Callable[[], None]) -> None:
        """Write the adapter, on rank 0. Every worker must call this. Raises Stop where the disk is full."""
        problem = unless_full(write, "the adapter", self._run) if self._team.rank == 0 else None
        if problem := self._team.gather(problem)[0]:
            raise Stop(f"{problem}. {FREE_SPACE}")

    def _write_best(self) -> str | None:
        problem = unless_full(self._best, "the best adapter", self._run) if self._best else None
        if not problem:
            self._best = None
        return problem

    def _wait(self, max_failures: int) -> None:
        problem = self._team.gather(self._problem or self._writer.finish())[0]
        self._failures = self._failures + 1 if problem else 0
        if problem and self._failures >= max_failures:
            raise Stop(f"{problem}, {self._failures}x in a row. {FREE_SPACE}")
        if problem:
            self._team.tell(kind="warning", message=f"{problem}. Training goes on; the next one is due as planned.")
