"""tune --plan: trials, resources, cost, before anything starts. Uses no Ray; small data is tokenized to count rows."""

import glob
import os
import tempfile

from rich.table import Table

from qlora_ray import storage
from qlora_ray.cluster import connect
from qlora_ray.config import Config
from qlora_ray.console import console, say_note
from qlora_ray.model.facts import read_facts
from qlora_ray.planning import memory
from qlora_ray.planning.early import local_base
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import Plan
from qlora_ray.sweep import capacity, screen, space

REFERENCE_GPU = "H100"


def show(config: Config) -> None:
    """Print the trials, what runs at a time, and what it may cost. Raises ConfigError as a start would."""
    from qlora_ray.sweep.run import check_early, check_records_once, distinct_configs, prepare_trials

    trials = space.known_trials(config)
    configs = distinct_configs(config, trials)
    check_early(config, configs)
    check_records_once(configs)
    hardware, known = hardware_of(config)
    with tempfile.TemporaryDirectory() as temporary:
        plans = prepare_trials(configs, storage.open_folder(temporary), hardware, inline=True)
    planned = capacity.plan_sweep(config, plans, hardware)
    table = Table("trial", *space.sweep_of(config).parameters, "steps")
    for trial, plan in zip(trials, plans, strict=False):
        table.add_row(trial.name, *map(screen.show_value, trial.parameters.values()), f"{plan.num_steps:,}")
    if trials:
        console.print(table)
    rows = screen.plan_rows(planned)
    rows |= _cost(config, configs[0], plans[0], planned.most_steps)
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts)
    if not known:
        say_note("ray.address: the cluster was not asked, so how many trials run at a time is not known.")


def hardware_of(config: Config) -> tuple[Hardware, bool]:
    """What trials would run on, and whether that is known: a cluster is not asked, and taken to hold one trial."""
    cores = len(os.sched_getaffinity(0))
    if not connect.address(config):
        return Hardware(cores, len(glob.glob("/dev/nvidia[0-9]*"))), True
    needed = {name: config.ray.max_workers * each for name, each in config.ray.resources_per_worker.items()}
    gpus = needed.pop("GPU", config.ray.max_workers if config.ray.use_gpu is True else 0)
    cpus = needed.pop("CPU", config.ray.max_workers)
    return Hardware(max(cores, cpus), gpus, other_resources=needed), False


def _cost(config: Config, one: Config, plan: Plan, steps: int) -> dict[str, str]:
    of_row = plan.tokens_per_micro_batch * one.training.sequence_parallel // plan.micro_batch_size
    tokens = steps * plan.global_batch_size * of_row
    rows = {"tokens": f"at most {tokens:,} ({plan.global_batch_size} rows x {of_row} a step)"}
    facts = read_facts(local_base(one))
    known = memory.sizes(one, facts, plan.num_trainable_parameters, plan.zero_stage, "bfloat16")
    choice = memory.all_layers(known, memory.Keep.HOST)
    speed = memory.tokens_per_second(known, plan.tokens_per_micro_batch, one.training.max_length, choice, REFERENCE_GPU)
    if speed:
        rows["time"] = f"about {tokens / speed / 3600:.2f} {REFERENCE_GPU} hours at {speed:,.0f} tokens/s each, and "
        rows["time"] += "the start of each trial; on CPUs only a trial can tell"
    budgets = space.sweep_of(config)
    if budgets.time_budget_seconds or budgets.token_budget:
        rows["budget"] = f"{budgets.time_budget_seconds or '-'} s, {budgets.token_budget or '-'} tokens"
    return rows
