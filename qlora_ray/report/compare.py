"""Several runs on one page: curves over each other, figures and answers side by side, and only what differs."""

from pathlib import Path

from qlora_ray.report.charts import overlay_chart
from qlora_ray.report.page import MISSING, Page, key_figures, render, write_page
from qlora_ray.rundir.record import RunRecord, dotted, is_right, read_run

CHARTS = {
    "loss": ("Loss, nats per token", ".4f"),
    "eval_loss": ("Validation loss", ".4f"),
    "grad_norm": ("Gradient norm", ".3f"),
    "learning_rate": ("Learning rate", ".2e"),
    "tokens_per_second": ("Tokens per second", ",.0f"),
    "peak_memory_gib": ("Peak memory, GiB", ".2f"),
}
NOT_A_CHOICE = ("ray.run_name", "ray.storage_path")  # differ from run to run, and mean nothing
NUM_PROMPTS = 12


def write_comparison(run_dirs: list[Path], output: Path) -> Path:
    """Write the comparison in one rename. Raises ValueError for a broken file."""
    return write_page(output, render_comparison([read_run(run_dir) for run_dir in run_dirs]))


def render_comparison(runs: list[RunRecord]) -> str:
    """The page: self-contained, like a run's own."""
    return render(comparison_page(runs))


def comparison_page(runs: list[RunRecord]) -> Page:
    """What the page of several runs shows."""
    charts = {name: overlay_chart(runs, name, number_format) for name, (_, number_format) in CHARTS.items()}
    charts = {name: chart for name, chart in charts.items() if chart is not None}
    values = dict(
        title=f"{len(runs)} runs compared",
        runs=[(run.name, run.summary.get("status", "unfinished")) for run in runs],
        titles={name: CHARTS[name][0] for name in charts},
        figures=figures_side_by_side(runs),
        differences=config_differences(runs),
        plan_differences=_differences([run.plan for run in runs]),
        answers=common_answers(runs)[:NUM_PROMPTS],
    )
    return Page("compare.html.j2", charts, values)


def figures_side_by_side(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """(label, value of each run) of the key figures."""
    columns = [{label: value for label, value, _ in key_figures(run)} for run in runs]
    return [(label, [column[label] for column in columns]) for label in columns[0]]


def config_differences(runs: list[RunRecord]) -> list[tuple[str, list[str]]]:
    """(dotted key, value in each run) of the settings that are not the same in all."""
    return [row for row in _differences([run.config for run in runs]) if row[0] not in NOT_A_CHOICE]


def common_answers(runs: list[RunRecord]) -> list[dict]:
    """Prompts that every run answered: {prompt, expected, base, answers: [(text, is right)]}."""
    by_prompt = [{sample["prompt"]: sample for sample in run.samples} for run in runs]
    common = [prompt for prompt in by_prompt[0] if all(prompt in samples for samples in by_prompt)]
    return [
        {
            "prompt": prompt,
            "expected": by_prompt[0][prompt].get("expected"),
            "answers": [(samples[prompt].get("adapter"), is_right(samples[prompt])) for samples in by_prompt],
        }
        for prompt in common
    ]


def _differences(groups: list[dict]) -> list[tuple[str, list[str]]]:
    columns = [dict(dotted(group)) for group in groups]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [(key, [column.get(key, MISSING) for column in columns]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
