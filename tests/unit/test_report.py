"""What the page of a run promises: self-contained, escaped, whole, and honest about a run that is not finished."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from qlora_ray.report import RunRecord, key_figures, main, read_run, render_report, smooth
from qlora_ray.report.charts import build_charts
from qlora_ray.report.compare import common_answers, config_differences, render_comparison
from qlora_ray.rundir.record import answers_by_prompt, data_statistics, memory, time_split

pytest.importorskip("plotly")

ATTACK = "</script><script>alert('xss')</script><img src=x onerror=alert(1)>"


def train_line(step, loss):
    return {"step": step, "loss": loss, "learning_rate": 2e-4, "tokens_per_second": 100.0 * step, "num_tokens": step}


@pytest.fixture
def run_dir(tmp_path):
    lines = [train_line(1, 2.5), train_line(2, 2.0), {"step": 2, "eval_loss": 0.0, "eval_perplexity": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


class Page(HTMLParser):
    """Tags with their attributes, and the text outside script and style."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.silent = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.silent = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.silent = False

    def handle_data(self, data):
        self.text += "" if self.silent else data


def hostile_run():
    sample = {"prompt": ATTACK, "expected": ATTACK, "base": ATTACK, "adapter": ATTACK}
    summary = {"status": ATTACK, "seconds": {ATTACK: 1.0}, "failures": [{"step": 1, "cause": ATTACK}]}
    manifest = {"data": {ATTACK: 1, "fingerprint": ATTACK}, "versions": {ATTACK: ATTACK}}
    by_step = [{"step": 1, "prompt": ATTACK, "expected": ATTACK, "adapter": ATTACK}]
    plan = {ATTACK: {ATTACK: ATTACK}, "memory_forecast_gib": {ATTACK: 1.0}}
    metrics = [{**train_line(1, 2.0), "peak_memory_gib": 1.0}]
    return RunRecord(ATTACK, {"key": ATTACK}, plan, summary, metrics, [sample], by_step, manifest)


def test_report_makes_no_external_request(run_dir):
    page = Page(render_report(read_run(run_dir)))
    assert not [
        tag for tag, attrs in page.tags if tag in ("link", "img", "iframe", "base") or {"src", "href"} & {*attrs}
    ]
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_html_from_the_run_is_escaped_everywhere():
    harmless = Page(render_report(RunRecord("run", {}, {}, {}, [train_line(1, 2.0)])))
    page = Page(render_report(hostile_run()))
    assert "<script>alert(" not in render_report(hostile_run())
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in harmless.tags].count("script")
    assert not [tag for tag, attrs in page.tags if tag == "img" or "onerror" in attrs]
    assert page.text.count(ATTACK) >= 14
    other = RunRecord(ATTACK + "2", {"key": 1}, {}, {}, [train_line(1, 2.0)], hostile_run().samples)
    compared = Page(render_comparison([hostile_run(), other]))
    assert [tag for tag, _ in compared.tags].count("script") == 2
    assert not [tag for tag, attrs in compared.tags if tag == "img" or "onerror" in attrs]
    assert compared.text.count(ATTACK) >= 8


def test_plotly_is_embedded_once(run_dir):
    assert render_report(read_run(run_dir)).count("* plotly.js v") == 1


def test_same_run_gives_the_same_page(run_dir):
    assert render_report(read_run(run_dir)) == render_report(read_run(run_dir))


def test_answers_are_marked_right_or_wrong():
    answers = [("a", " a\n"), ("a", "b"), (None, "c")]
    samples = [{"prompt": "p", "expected": expected, "base": "x", "adapter": got} for expected, got in answers]
    text = Page(render_report(RunRecord("run", {}, {}, {}, [], samples))).text
    assert (text.count("✓ right"), text.count("✗ wrong")) == (1, 1)


def test_unfinished_run_shows_logged_figures(run_dir):
    figures = {label: value for label, value, _ in key_figures(read_run(run_dir))}
    assert figures["Loss"] == "2.500 → 2.000"
    assert figures["Perplexity"] == "1.00"
    assert figures["Tokens per second"] == "150"
    assert figures["Failures survived"] == "–"


def test_step_that_ran_again_counts_once():
    run = RunRecord("run", {}, {}, {}, [train_line(1, 3.0), train_line(2, 9.0), train_line(2, 2.0)])
    assert dict((label, value) for label, value, _ in key_figures(run))["Loss"] == "3.000 → 2.000"


def test_empty_metrics_give_a_page_without_charts():
    assert "No step has been logged yet." in render_report(RunRecord("run", {}, {}, {}, []))


def test_half_written_last_line_is_left_out(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_run(run_dir).metrics] == [1, 2, 2]


def test_broken_line_is_refused_with_its_number(run_dir, capsys):
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    assert main([str(run_dir)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_one_slow_step_does_not_bend_the_smoothed_line():
    assert smooth([1.0] * 100 + [50.0] + [1.0] * 100) == [1.0] * 201


def test_door_prints_the_path_and_leaves_only_the_report(run_dir, capsys):
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl", "report.html"]


@pytest.mark.parametrize("name", ["", "missing"])
def test_door_refuses_what_is_not_a_run_directory(tmp_path, capsys, name):
    assert main([str(tmp_path / name)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_import_is_light():
    code = "import sys, qlora_ray.report; print({'torch', 'ray', 'plotly', 'jinja2'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_time_split_adds_up_to_the_whole_run():
    lines = [{"step": 1, "loss": 1.0, "step_seconds": 2.0, "data_seconds": 0.5, "forward_seconds": 1.0}]
    lines += [{"step": 4, "loss": 1.0, "step_seconds": 2.0, "data_seconds": 0.1, "forward_seconds": 1.0}]
    lines += [{"step": 4, "evaluation_seconds": 3.0}, {"step": 4, "checkpoint_seconds": 0.5}]
    split = time_split(RunRecord("run", {}, {}, {"seconds": {"to_first_step": 10.0, "total": 20.0}}, lines))
    assert split == pytest.approx(
        {"start": 10.0, "data": 0.5 + 3 * 0.1, "forward": 4.0, "evaluation": 3.0, "checkpoint": 0.5, "other": 1.7}
    )
    assert sum(split.values()) == pytest.approx(20.0)


def test_memory_leaves_loading_out_of_the_sum():
    plan = {"memory_forecast_gib": {"base": 1.0, "logits": 0.5, "while_loading": 9.0}}
    found = memory(RunRecord("run", {}, plan, {}, [{"step": 1, "peak_memory_gib": 1.2}]))
    assert (found["forecast"], found["measured"]) == (1.5, 1.2)


def test_answer_of_a_step_done_again_replaces_the_first():
    lines = [
        {"step": step, "prompt": "p", "expected": "e", "adapter": text}
        for step, text in ((20, "x"), (10, "y"), (20, "e"))
    ]
    (row,) = answers_by_prompt(RunRecord("run", {}, {}, {}, [], [], lines))
    assert row == {"prompt": "p", "expected": "e", "answers": [(10, "y", False), (20, "e", True)]}


def test_data_statistics_name_rows_tokens_and_fingerprint():
    data = {"num_rows": 4, "num_tokens": 100, "num_label_tokens": 25, "fingerprint": "f"}
    rows = dict(data_statistics(RunRecord("run", {}, {}, {}, [], manifest={"data": data})))
    assert rows["share of tokens trained on"] == "25%" and rows["tokens a row, mean"] == "25.0"
    assert rows["rows"] == "4" and rows["fingerprint"] == "f"


def test_comparison_shows_only_what_differs_and_what_all_answered():
    def run(name, rate, prompts):
        config = {"training": {"learning_rate": rate, "seed": 0}, "ray": {"run_name": name}}
        samples = [{"prompt": p, "expected": "e", "base": "", "adapter": "e"} for p in prompts]
        return RunRecord(name, config, {}, {}, [train_line(1, 2.0)], samples)

    runs = [run("a", 1e-3, "xy"), run("b", 1e-4, "yz")]
    assert config_differences(runs) == [("training.learning_rate", ["0.001", "0.0001"])]
    assert [row["prompt"] for row in common_answers(runs)] == ["y"]
    page = Page(render_comparison(runs))
    assert "2 runs compared" in page.text and "training.seed" not in page.text
    assert not [
        tag for tag, attrs in page.tags if tag in ("link", "img", "iframe", "base") or {"src", "href"} & {*attrs}
    ]


def test_door_compares_several_runs_beside_the_first(run_dir, capsys):
    other = run_dir / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps(train_line(1, 2.0)) + "\n")
    assert main([str(other), str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "comparison.html")
    assert main([str(other), str(run_dir), "--output", str(run_dir / "x.html")]) == 0 and (run_dir / "x.html").exists()
    assert main([str(other), str(run_dir / "no")]) == 2


def test_figures_of_pairs_are_drawn_with_those_of_the_validations():
    lines = [{**train_line(step, 0.5), "rewards/margins": 0.1 * step} for step in (1, 2, 3)]
    lines += [{"step": 3, "eval_loss": 0.4, "eval_rewards/margins": 0.7}]
    figure = build_charts(RunRecord("run", {}, {}, {}, lines))["rewards/margins"]
    assert [(list(trace.x), list(trace.y)) for trace in figure.data][-1] == ([3], [0.7])
