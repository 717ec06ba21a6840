"""tune --plan: trials, resources, cost, before anything starts. Uses no Ray; small data is tokenized to count rows."""

import os
import tempfile

from rich.table import Table

from qlora_ray import cluster, forecast, screen, storage, train
from qlora_ray.config import Config
from qlora_ray.data.check import check_records
from qlora_ray.data.prepare import prepare
from qlora_ray.model.facts import read_facts
from qlora_ray.plan import Hardware, Plan, make_plan, packs
from qlora_ray.sweep import board, fit, space

REFERENCE_GPU = "H100"


def show(config: Config) -> None:
    """Print the trials, what runs at a time, and what it may cost. Raises ConfigError as a start would."""
    from qlora_ray.sweep.run import check_early, distinct_configs

    trials = space.known_trials(config)
    configs = distinct_configs(config, trials)
    check_early(config, configs)
    for one in configs:
        check_records(one)
    hardware, known = hardware_of(config)
    with tempfile.TemporaryDirectory() as temporary:
        plans = [_plan(one, temporary, hardware) for one in configs]
    reports = fit.reports_of(config, plans)
    room, why = fit.concurrent_trials(config, plans, hardware)
    table = Table("trial", *space.sweep_of(config).parameters, "steps")
    for trial, plan in zip(trials, plans, strict=False):
        table.add_row(trial.name, *map(board.show_value, trial.parameters.values()), f"{plan.num_steps:,}")
    if trials:
        screen.console.print(table)
    rows = board.plan_rows(config, plans, reports, room, why)
    rows |= _cost(config, configs[0], plans[0], fit.expected_steps(config, reports))
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    for name, value in rows.items():
        facts.add_row(name, value)
    screen.console.print(facts)
    if not known:
        screen.say_note("ray.address: the cluster was not asked; the numbers are of this machine's cores.")


def hardware_of(config: Config) -> tuple[Hardware, bool]:
    """This machine as a private Ray would see it, without GPUs; and whether that is where the trials would run."""
    cores = len(os.sched_getaffinity(0))
    if not cluster.address(config):
        return Hardware(cores, 0), True
    needed = config.ray.max_workers * config.ray.resources_per_worker.get("CPU", 1)
    return Hardware(max(cores, needed), 0), False


def _plan(config: Config, folder: str, hardware: Hardware) -> Plan:
    base = storage.open_folder(folder)
    facts = read_facts(train.local_base(config))
    data = prepare(config, base, packs(config, facts))
    resources = {**config.ray.resources_per_worker}
    if config.ray.use_gpu is True or resources.get("GPU"):  # of a cluster that is not asked
        hardware = Hardware(hardware.num_cpus, config.ray.max_workers * resources.get("GPU", 1))
    return make_plan(config, data.stats, facts, hardware, train.read_deepspeed_json(config))


def _cost(config: Config, one: Config, plan: Plan, steps: int) -> dict[str, str]:
    tokens = steps * plan.global_batch_size * one.training.max_length
    rows = {"tokens": f"at most {tokens:,} ({plan.global_batch_size} rows x {one.training.max_length} a step)"}
    facts = read_facts(train.local_base(one))
    known = forecast.sizes(one, facts, plan.num_trainable_parameters, plan.zero_stage, "bfloat16")
    choice = forecast.all_layers(known, forecast.Keep.HOST) if known.layer else None
    speed = forecast.tokens_per_second(known, one.training.max_length, choice, REFERENCE_GPU)
    if speed:
        rows["time"] = f"about {tokens / speed / 3600:.2f} {REFERENCE_GPU} hours at {speed:,.0f} tokens/s each, and "
        rows["time"] += "the start of each trial; on CPUs only a trial can tell"
    budgets = space.sweep_of(config)
    if budgets.time_budget_seconds or budgets.token_budget:
        rows["budget"] = f"{budgets.time_budget_seconds or '-'} s, {budgets.token_budget or '-'} tokens"
    return rows
