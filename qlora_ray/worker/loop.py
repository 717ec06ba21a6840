"""The training loop: one verb a line, from the newest checkpoint to the adapter."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import ray.train
import ray.train.torch
import torch

from qlora_ray import laps
from qlora_ray.data.delivery import Stream
from qlora_ray.data.order import Order
from qlora_ray.errors import ConfigError, GuardError, Stop
from qlora_ray.model.balance import balance_of
from qlora_ray.planning.plan import learning_rate_at
from qlora_ray.rundir import names
from qlora_ray.rundir.metrics import MetricsFile
from qlora_ray.worker import checkpoint, evaluate, export, reference, setup
from qlora_ray.worker.engine import Engine
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats
from qlora_ray.worker.messages import Done, Evaluated, Fatal, Holding, Ready, Refused, Run, Warned
from qlora_ray.worker.metrics import Meter, RowCounts
from qlora_ray.worker.micro_batches import MicroBatch, MicroBatches
from qlora_ray.worker.preference import Preference
from qlora_ray.worker.routing import busiest_expert
from qlora_ray.worker.saver import Saver
from qlora_ray.worker.seat import seat_of
from qlora_ray.worker.state import State
from qlora_ray.worker.stopwatch import Stopwatch
from qlora_ray.worker.team import Team
from qlora_ray.worker.watchdog import Watchdog
from qlora_ray.worker.worker import Worker


def run_worker(run: Run, channel: Any) -> None:
    """Train from the newest checkpoint to the end of the plan, or to where the driver asks to stop.

    What one worker finds alone ends all: it tells the driver why, and its exception ends the group.
    """
    team = Team(channel)
    log_folder = setup.send_output_to_log(run.folder, team.rank, run.debug)
    watchdog = Watchdog(run.config.watchdog, log_folder, team.rank)
    try:
        setup.check_shared(run.folder, team)
        _train(run, team, watchdog)
    except Stop as error:
        team.tell(Fatal(str(error)))
        team.wait_until_told()
    except ConfigError as refusal:
        team.tell_from_any_rank(Refused(str(refusal)))
        raise
    except GuardError as error:
        team.tell_from_any_rank(Fatal(f"worker {team.rank}: {error}"))
        raise
    except torch.OutOfMemoryError as error:
        team.tell_from_any_rank(Fatal(setup.out_of_memory_message(run.config, run.plan, team.rank, error)))
        raise


def _train(run: Run, team: Team, watchdog: Watchdog) -> None:
    with watchdog.phase("load"):
        worker, state, micro_batches = _load(run, team)
    if run.config.training.prefers:
        worker = replace(worker, preferences=reference.preferences(worker, watchdog, state.step))
        worker.meter.skip_time("reference", state.step)
    plan, patience, meter = run.plan, run.config.training.early_stopping_patience, worker.meter
    deadline, stopping = watchdog.deadline("step"), False
    while not (stopping or state.has_ended(plan.num_steps, patience)):
        with watchdog.phase("step", deadline):
            learning_rate = learning_rate_at(state.step, plan, run.config)
            sums, is_finite = optimizer_step(
                worker.engine, _of_step(worker, micro_batches, state.step),
                meter.counts.summands(state.step), learning_rate, meter.stopwatch,
            )  # fmt: skip
            state = replace(state, step=state.step + 1)
            meter.add(state.step, sums)
            state = _count_skipped(worker, state, is_finite)
            longest = watchdog.longest("step") + watchdog.longest("save")
            orders = team.agree(state.step, watchdog.deadline("step"), longest)
            stopping, deadline = orders.stop, orders.deadline
            ordered = bool(orders.save or orders.hold_until)
            save_is_due = ordered or stopping or state.step % plan.checkpoint_every_steps == 0
            if state.step in (1, plan.num_steps) or state.step % run.config.logging.every_steps == 0 or save_is_due:
                state = _log(worker, state, learning_rate)
        if plan.eval_every_steps and (state.step % plan.eval_every_steps == 0 or state.step == plan.num_steps):
            with watchdog.phase("evaluate"):
                state = _validate(worker, state)
            meter.skip_time("evaluation")
        if save_is_due or state.has_ended(plan.num_steps, patience):
            with watchdog.phase("save"):
                state = _log(worker, state, learning_rate) if meter.has_steps else state
                worker.saver.save(state, worker.engine.state)
                if ordered:
                    worker.saver.finish()
            if orders.hold_until and not (stopping or state.has_ended(plan.num_steps, patience)):
                team.tell(Holding())
                _wait_for_the_end(orders.hold_until)
            meter.skip_time("checkpoint")
    with watchdog.phase("save"):
        worker.saver.finish()
        meter.flush()
        worker.saver.save_last(_adapter_writer(worker, names.ADAPTER, worker.reached(state)))
    with watchdog.phase("evaluate"):
        answers = {} if stopping else evaluate.compare_answers(worker)
        pairs = [] if stopping else evaluate.compare_pairs(worker)
    early = state.step < plan.num_steps and state.is_patience_over(patience)
    team.tell(Done("interrupted" if stopping else "done", worker.reached(state), answers, early, pairs))
    team.wait_until_told()


def _load(run: Run, team: Team) -> tuple[Worker, State, MicroBatches]:
    """The newest checkpoint, the model, and the rows from there on."""
    config, plan = run.config, run.plan
    resumed = checkpoint.load_latest(run.folder, set_aside=team.rank == 0)
    state = State.of(resumed.progress["state"]) if resumed else State()
    order = Order(
        setup.num_rows(run.rows), config.training.seed, plan.micro_batch_size, plan.micro_batches_per_step,
        is_shuffled=config.data.order == "shuffled",
    )  # fmt: skip
    device = ray.train.torch.get_device()
    setup.choose_memory(config, plan, device)
    setup.choose_kernels(config, device)
    seat = seat_of(team.rank, team.size, config.training.sequence_parallel)
    with laps.part("tokenizer and rows"):
        tokenizer = setup.tokenizer_of(config, run.rows)
        stream = Stream(run.rows, order, seat.group, seat.num_groups, state.step, plan.num_steps)
    micro_batches = MicroBatches(stream, seat, config.training.seed, tokenizer.pad_token_id, device)
    engine = setup.build_engine(run, team, device, tokenizer.pad_token_id, resumed.adapter if resumed else None)
    writer = MetricsFile(run.folder, state.step) if team.rank == 0 else None
    meter = Meter(team, RowCounts(run.rows, order), writer, device)
    engine.time_gathers(meter.stopwatch)
    team.tell(Ready(state.step, laps.began(), laps.taken(), resumed.broken if resumed else []))
    return Worker(run, team, engine, tokenizer, device, meter, Saver(run, team)), state, micro_batches


def _of_step(worker: Worker, micro_batches: MicroBatches, step: int) -> Iterable[MicroBatch]:
    """The micro-batches of a step, each with what is asked of it."""
    preference = worker.preferences.get("train")
    if preference is None or worker.run.config.training.records != "labels":
        return micro_batches.of_step(step, preference)

    def measure(mismatched) -> Preference:
        return replace(preference, kl=preference.measured_kl(worker.engine, worker.team, mismatched))

    return micro_batches.of_labelled_step(step, measure)


def optimizer_step(
    engine: Engine, micro_batches: Iterable[MicroBatch], num_summands: int, learning_rate: float,
    stopwatch: Stopwatch,
) -> tuple[list[torch.Tensor], bool]:  # fmt: skip
    """One update from the gradient of: nats over all unmasked tokens of the global batch / their number.

    Of pairs: their losses / their number. Returns the sum of each of this worker's micro-batches on the device (a
    scalar; of pairs followed by those of objectives.FIGURES), and whether the gradient was finite: if not, nothing was
    changed. Every worker must call this, with as many micro-batches.
    """
    each: list[torch.Tensor] = []
    stopwatch.start()
    for micro_batch in micro_batches:
        stopwatch.mark("data")
        sums = _learn(engine, micro_batch, num_summands, stopwatch)
        stopwatch.mark("communication")
        if micro_batch.counts:
            each.append(sums)
    is_finite = engine.step(learning_rate)
    stopwatch.mark("optimizer")
    return each, is_finite


def _learn(engine: Engine, micro_batch: MicroBatch, num_summands: int, stopwatch: Stopwatch) -> torch.Tensor:
    """Forward and backward pass, whose gradient is added up; returns what is added up for the log."""
    batch = engine.graphs.padded(micro_batch.tensors) if engine.graphs else None
    if engine.graphs and batch is not None:
        micro_batch = replace(micro_batch, tensors=batch)
        if recorded := engine.recorded(batch):
            sums, gradient = recorded.replay(batch, num_summands)
            stopwatch.mark("backward")  # forward too: they are one launch
            engine.add_up(micro_batch.num_present, gradient)
            return sums
    loss, sums = _sums(engine, micro_batch)
    stopwatch.mark("forward")
    engine.backward(loss / num_summands)
    stopwatch.mark("backward")
    engine.add_up(micro_batch.num_present)
    return sums


def _sums(engine: Engine, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What is differentiated of a micro-batch, and what is added up for the log."""
    if micro_batch.preference is None:
        nats = sum_of_nats(engine, micro_batch.tensors)
        if balance := balance_of(engine.module):
            balance.follow(nats, num_label_tokens(micro_batch.tensors))
        return nats, nats.detach()
    loss, figures = micro_batch.preference.sums(engine, micro_batch.tensors)
    return loss, torch.cat([loss.detach()[None], figures])


def _log(worker: Worker, state: State, learning_rate: float) -> State:
    entry = worker.meter.log(
        learning_rate=learning_rate, grad_norm=worker.engine.grad_norm(), epoch=worker.meter.counts.epochs(state.step),
        **busiest_expert(worker.engine.module, worker.team),
    )  # fmt: skip
    loss = entry.get("loss", state.last_loss)
    return replace(state, first_loss=loss if state.first_loss is None else state.first_loss, last_loss=loss)


def _count_skipped(worker: Worker, state: State, is_finite: bool) -> State:
    """Note a step that was skipped, with its samples; raises Stop after too many in a row."""
    if is_finite:
        return replace(state, num_skipped_in_a_row=0)
    state = replace(
        state, num_skipped_steps=state.num_skipped_steps + 1, num_skipped_in_a_row=state.num_skipped_in_a_row + 1
    )
    samples = worker.meter.counts.sample_numbers(state.step - 1)
    worker.meter.write(step=state.step, skipped=True, samples=samples)
    named = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    worker.team.tell(Warned(f"Step {state.step:,} was skipped: its gradient is not finite. Samples {named}."))
    if state.num_skipped_in_a_row >= worker.run.config.training.max_skipped_steps:
        raise Stop(
            f"the gradients of {state.num_skipped_in_a_row} steps in a row, up to step {state.step:,}, are not finite: "
            "they never reached the weights, and the last checkpoint is good. Lower training.learning_rate, or look "
            "at the samples that metrics.jsonl names."
        )
    return state


def _validate(worker: Worker, state: State) -> State:
    metrics = evaluate.validation_loss(worker)
    evaluated = state.evaluated(metrics, worker.run.config.training.metric_for_best_model)
    if evaluated.best_eval_step == state.step:
        write = _adapter_writer(worker, names.ADAPTER_BEST, {**worker.reached(state), **metrics})
        if worker.team.rank == 0:
            worker.saver.save_best(write)
    worker.meter.write(step=state.step, **metrics)
    worker.team.tell(Evaluated(state.step, metrics, evaluate.sample_answers(worker)))
    ray.train.report({"step": state.step, "loss": state.last_loss, **metrics})
    return evaluated


def _adapter_writer(worker: Worker, name: str, reached: dict[str, Any]) -> Callable[[], None]:
    """What writes the adapter of now, whenever it is called. Every worker must call this; rank 0 may use it."""
    weights, run = worker.engine.weights(), worker.run

    def write() -> None:
        values = export.in_dtype(weights, run.plan.compute_dtype)
        export.write_adapter(
            run.folder / name, worker.engine.module, values, worker.tokenizer, export.about(run, reached)
        )

    return write


def _wait_for_the_end(until: float) -> None:
    """Do nothing until Ray Train ends this worker group: what would be computed now would be lost."""
    while time.time() < until:
        time.sleep(0.1)
