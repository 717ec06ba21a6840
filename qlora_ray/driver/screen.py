"""What a person sees in the terminal: the plan, one live line, the result. Writes nothing to disk."""

import json
import sys
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from qlora_ray.config import OBJECTIVES, Config
from qlora_ray.console import console, say_note
from qlora_ray.data.stats import DataStats
from qlora_ray.model.facts import BaseFacts
from qlora_ray.planning.holding import shown
from qlora_ray.planning.plan import Plan, shown_layers
from qlora_ray.planning.sharing import shown_sharing
from qlora_ray.rundir import names
from qlora_ray.storage import Folder


def show_plan(plan: Plan, config: Config, data: DataStats, base: BaseFacts, run: Folder) -> None:
    """The plan as a table, with one line for each thing a user should know."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    forecast = plan.memory_forecast_gib
    needed = sum(value for part, value in forecast.items() if part != "while_loading")
    sharing = shown(plan.shares_base, plan.is_shared_by_node, plan.why_shared)
    kind, is_shared = "GPU" if plan.use_gpu else "CPU", config.training.sequence_parallel > 1
    rows = {
        "base": f"{config.model.base_model} ({base.model_type}, {base.num_parameters / 1e6:,.1f} M parameters, "
        f"{plan.four_bit_share:.0%} in {config.quantization.type})",
        "adapter": f"{config.model.lora_variant}, r={config.model.lora_r}, alpha={config.model.lora_alpha:g}, "
        f"{plan.num_trainable_parameters / 1e6:,.2f} M parameters in {shown_layers(plan)}",
        **({"objective": _show_objective(config)} if config.training.prefers else {}),
        "data": _show_data(data),
        "workers": f"{plan.num_workers} x 1 {kind}, ZeRO stage {plan.zero_stage}, {plan.compute_dtype}",
        **({"base on each": sharing} if sharing else {}),
        **({f"base on {'disk' if plan.passing.disk_bytes else 'host'}": str(plan.passing)} if plan.passing else {}),
        "batch": f"{plan.global_batch_size} rows = {plan.micro_batch_size} a forward pass x "
        f"{plan.gradient_accumulation_steps} accumulated x {_show_groups(config)}",
        **({"rows": shown_sharing(config, plan.layer_shape, base.num_layers, data.longest_row)} if is_shared else {}),
        "steps": f"{plan.num_steps:,} ({plan.steps_per_epoch:,} an epoch), checkpoint every "
        f"{plan.checkpoint_every_steps:,}, validation every {plan.eval_every_steps or '-'}",
        **({"network": str(plan.traffic)} if plan.traffic else {}),
        "memory": f"about {needed:.2f} GiB a worker for tensors, {forecast['while_loading']:.2f} while loading",
        "run": run.path,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for note in plan.notes:
        say_note(note)
    console.print()


def _show_groups(config: Config) -> str:
    size = config.training.sequence_parallel
    return f"{config.ray.max_workers} workers" if size == 1 else f"{config.num_row_groups} groups of {size} workers"


def _show_objective(config: Config) -> str:
    training = config.training
    settings = ", ".join(f"{name} {getattr(training, name)}" for name in OBJECTIVES[training.objective])
    return f"{training.objective} ({settings})"


def _show_data(data: DataStats) -> str:
    formats, each = " + ".join(data.formats), data.samples_of_record
    in_rows = f" packed into {data.num_rows:,} rows ({data.packing_efficiency:.0%} full)" if data.packed else ""
    return (
        f"{data.num_samples // each:,} {'pairs' if data.samples_of_record == 2 else 'samples'} ({formats}){in_rows}, "
        f"{data.num_tokens:,} tokens ({data.num_label_tokens / data.num_tokens:.0%} trained on), "
        f"{data.num_validation_samples // each:,} held out"
    )


class Progress:
    """One live line; where the output is not a terminal, a line at each tenth of the run."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._is_live = console.is_terminal
        self._next_line = 0
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TextColumn("left"), TimeRemainingColumn(), console=console, disable=not self._is_live, expand=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._task = self._bar.add_task("loading", total=plan.num_steps, now="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def show(self, entry: dict[str, Any]) -> None:
        """Show one logged step."""
        loss = f"loss {entry['loss']:.4f}" if "loss" in entry else "no finite loss"
        if "rewards/margins" in entry:
            loss += f"  margin {entry['rewards/margins']:.3f}"
        if "rewards/accuracies" in entry:
            loss += f"  right {entry['rewards/accuracies']:.0%}"
        now = (
            f"{loss}  lr {entry['learning_rate']:.1e}  {entry['tokens_per_second']:,.0f} tokens/s  "
            f"{entry['peak_memory_gib']:.1f} GiB"
        )
        self._bar.update(
            self._task, completed=entry["step"], total=self._plan.num_steps, description="training", now=now
        )
        if not self._is_live and (entry["step"] >= self._next_line or entry["step"] == self._plan.num_steps):
            console.print(f"step {entry['step']:,}/{self._plan.num_steps:,}  {now}")
            self._next_line = entry["step"] + max(1, self._plan.num_steps // 10)

    def show_reference(self, split: str, done: int, total: int) -> None:
        """Show how much of the reference's log-probabilities is there."""
        self._bar.update(self._task, completed=done, total=total, description=f"reference of {split}", now="")
        if not self._is_live and done == total:
            console.print(f"reference: log-probabilities of {split} are computed")

    def say_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Show one validation."""
        parts = {"eval_perplexity": "perplexity {:.3f}", "eval_rewards/margins": "margin {:.3f}",
                 "eval_rewards/accuracies": "right {:.0%}"}  # fmt: skip
        told = [form.format(metrics[name]) for name, form in parts.items() if name in metrics]
        self.say(", ".join([f"step {step:,}: eval_loss {metrics['eval_loss']:.4f}", *told]))

    def say(self, text: str) -> None:
        """A line that stays."""
        console.print(text, markup=False)

    def note(self, text: str) -> None:
        """A line that stays, marked as worth reading."""
        say_note(text)


def show_result(summary: dict[str, Any], run: Folder) -> None:
    """How the run ended, and where its results are."""
    console.print()
    if summary["status"] == "refused":
        print(f"error: {summary['reason']}", file=sys.stderr)
        return
    if summary["status"] == "failed":
        print(f"error: the run failed: {summary['reason']}", file=sys.stderr)
        print(
            f"Logs: {run.path}/{names.LOGS}. The same command with --resume goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return
    if summary["status"] == "interrupted":
        console.print(f"Interrupted after step {summary['steps']:,}. The same command with --resume and "
                      f"ray.run_name={run.name} goes on from there.")  # fmt: skip
        return
    if summary.get("first_loss") is not None:
        console.print(f"loss {summary['first_loss']:.4f} -> {summary['last_loss']:.4f} in {summary['steps']:,} steps")
    _show_samples(run, summary)
    _show_places(run)


def show_done_before(step: int, run: Folder) -> None:
    """That a run is resumed which has nothing left to do, and where its results are."""
    console.print(f"Done already: all of this run, up to step {step:,}, with this config. Nothing was changed.")
    _show_places(run)


def _show_places(run: Folder) -> None:
    console.print(f"adapter  {escape(run.path)}/{names.ADAPTER}")
    console.print(f"report   {escape(run.path)}/{names.REPORT}")


def _show_samples(run: Folder, summary: dict[str, Any]) -> None:
    if "exact_match_base" not in summary:
        return
    samples = json.loads((run / names.SAMPLES).read_bytes())
    console.print(f"exact match on {len(samples)} held-out prompts: {summary['exact_match_base']:.0%} before, "
                  f"[bold]{summary['exact_match_adapter']:.0%} after[/]\n")  # fmt: skip
    table = Table("prompt", "base", "with the adapter", show_lines=True)
    for sample in samples[:3]:
        table.add_row(*(_shortened(sample[name]) for name in ("prompt", "base", "adapter")))
    console.print(table)


def _shortened(text: str, length: int = 200) -> str:
    text = text.strip()
    return escape(text if len(text) <= length else text[: length - 1] + "…")
