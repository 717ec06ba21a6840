"""Pairs of answers: log-probabilities in packed rows, the reference, and whole runs, whoever computes them."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_ray import evaluate, train
from qlora_ray.config import Config, TrainingConfig, base_model_path
from qlora_ray.data.order import NO_ROW, Order
from qlora_ray.data.rows import Rows
from qlora_ray.data.tokenize import IGNORE_INDEX, Sample
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import load_base
from qlora_ray.model.fused import fuse, fused_layers
from qlora_ray.storage import open_folder
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.loss import log_probabilities
from qlora_ray.worker.objectives import OBJECTIVES
from qlora_ray.worker.preference import Preference
from tests.integration import door, engines, many_runs, tiny_models
from tests.made_rows import make_rows

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"
NUM_PAIRS = 6


def samples() -> list[Sample]:
    """Pairs with a common prompt, the chosen sample before the rejected one."""
    random = torch.Generator().manual_seed(0)
    made = []
    for number in range(NUM_PAIRS):
        prompt, *answers = (
            torch.randint(3, 2048, (length,), generator=random).tolist() for length in (4 + number, 5 + number % 3, 9)
        )
        made += [Sample(prompt + answer, [(len(prompt), len(prompt + answer))], False) for answer in answers]
    return made


def rows_of_pairs(folder, rows: list[list[int]]) -> Rows:
    """Rows that hold these pairs each."""
    held = [[2 * pair for pair in row] + [2 * pair + 1 for pair in row] for row in rows]
    return make_rows(folder, samples(), held, packed=True, pairs="apart")


def model_of(base: str, quantization: str, is_fused: bool) -> torch.nn.Module:
    """A LoRA that changes what its base says."""
    config = tiny_models.make_config(base, quantization={"type": quantization})
    model = add_adapter(load_base(config.model, config.quantization, "float32", CPU), config.model, torch.float32, 0)
    torch.manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    if is_fused:
        fuse(model)
        assert fused_layers(model)
    return model.eval()


def alone(model: torch.nn.Module, sample: Sample) -> float:
    """Log-probability of a sample's answer in a row of its own, the long way."""
    ids = torch.tensor([sample.input_ids])
    log_probs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return sum(float(log_probs[i - 1, ids[0, i]]) for start, end in sample.spans for i in range(start, end))


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3], [4, 5]], [[pair] for pair in range(NUM_PAIRS)]])
def test_log_probability_of_each_answer_is_that_of_its_row_alone(rows, is_fused, tmp_path):
    base = tiny_models.save("llama", tmp_path / "base")
    model = model_of(base, "nf4" if is_fused else "none", is_fused)
    held = rows_of_pairs(tmp_path / "cache", rows)
    batch = to_tensors(held.gather(np.array([*range(len(held)), NO_ROW])), 0, CPU)
    with torch.no_grad():
        found, num_tokens = log_probabilities(model, batch)
        places = held.samples_of(np.arange(len(held)))[batch["places"].numpy()]
        expected = [alone(model, samples()[place]) for place in places]
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    assert num_tokens.tolist() == [samples()[place].num_labels for place in places]
    assert places[:NUM_PAIRS].tolist() == (places[NUM_PAIRS:] - 1).tolist()


def gradients(model: torch.nn.Module, preference: Preference, batches: list) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of all the batches' pairs and its gradient, by parameter."""
    losses = [preference.sums(model, batch)[0] / NUM_PAIRS for batch in batches]
    for loss in losses:
        loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.zero_grad()
    return sum(float(loss.detach()) for loss in losses), found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_do_not_depend_on_rows_and_micro_batches(objective, tmp_path):
    model = model_of(tiny_models.save("llama", tmp_path / "base"), "nf4", is_fused=True)
    training = TrainingConfig.model_validate({"objective": objective})
    found = []
    for number, rows in enumerate([[[0, 1, 2], [3, 4, 5]], [[5], [0], [1], [2], [4], [3]], [[1, 4], [0, 5], [2], [3]]]):
        held = rows_of_pairs(tmp_path / f"cache{number}", rows)
        of_sample = -torch.arange(2.0 * NUM_PAIRS)  # of a reference
        reference = of_sample[held.samples_of(np.arange(len(held)))] if training.has_reference else None
        cuts = [[*range(len(held))], *([row] for row in range(len(held)))]
        for parts in ([cuts[0]], cuts[1:]):
            batches = [to_tensors(held.gather(np.array(part)), 0, CPU) for part in parts]
            found.append(gradients(model, Preference(training, reference), batches))
    (loss, first), *others = found
    for other, gradient in others:
        assert other == pytest.approx(loss, rel=1e-5)
        for name, value in gradient.items():
            assert float((value - first[name]).norm() / first[name].norm()) < 1e-4


def test_micro_batch_without_a_pair_has_no_loss_and_no_gradient(tmp_path):
    model = model_of(tiny_models.save("llama", tmp_path / "base"), "nf4", is_fused=True)
    held = rows_of_pairs(tmp_path / "cache", [[0]])
    batch = to_tensors(held.gather(np.array([NO_ROW])), 0, CPU)
    loss, figures = Preference(TrainingConfig(objective="simpo"), None).sums(model, batch)
    loss.backward()
    assert float(loss) == 0 and figures.tolist() == [0] * len(figures)
    assert all(not bool(parameter.grad.any()) for parameter in trainable(model).values() if parameter.grad is not None)


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_worker():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def settings(storage, name, num_workers, *more):
    return [
        "-c", "configs/dpo.yaml", f"ray.storage_path={storage}", f"ray.run_name={name}",
        f"ray.num_workers={num_workers}", f"training.gradient_accumulation_steps={4 // num_workers}",
        "ray.resources_per_worker={CPU: 0.5}", "training.metric_for_best_model=eval_rewards/accuracies",
        "training.max_steps=8", "training.eval_every_steps=4", "logging.every_steps=1", "checkpoint.every_steps=2",
        "evaluation.num_prompts=2", "evaluation.max_new_tokens=8", "model.lora_r=8", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """An uninterrupted run of two workers."""
    storage = tmp_path_factory.mktemp("runs")
    ended = many_runs.run(*settings(storage, "two", 2))
    assert ended.returncode == 0, ended.stderr
    return storage


def reference_file(storage):
    (file,) = (storage / "cache").glob("reference-*/*")
    return file


def test_figures_have_trls_names_and_margins_grow(storage):
    lines = [line for line in door.metrics(storage / "two") if "loss" in line]
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
            "logps/rejected"} <= lines[0].keys()  # fmt: skip
    assert [line["step"] for line in door.metrics(storage / "two") if "reference_seconds" in line] == [0]
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["rewards/margins"] > 0.1
    validations = [line for line in door.metrics(storage / "two") if "eval_loss" in line]
    assert len(validations) == 2 and "eval_perplexity" not in validations[0]
    assert validations[-1]["eval_rewards/accuracies"] > 0.9
    assert validations[-1]["eval_loss"] < validations[0]["eval_loss"]


def test_best_adapter_is_that_of_the_figure_that_decides(storage):
    validations = [line for line in door.metrics(storage / "two") if "eval_loss" in line]
    best = max(validations, key=lambda line: line["eval_rewards/accuracies"])  # the first of equals
    assert best["eval_loss"] > min(line["eval_loss"] for line in validations)  # which would have chosen another
    assert json.loads((storage / "two" / "adapter_best" / "qlora_ray.json").read_text())["step"] == best["step"]


def test_report_shows_held_out_pairs_before_and_after(storage):
    pairs = json.loads((storage / "two" / "pairs.json").read_text())
    assert pairs and all(pair["adapter"] > pair["base"] for pair in pairs)
    rows = [json.loads(line) for line in Path("data/preferences_sample.jsonl").read_text().splitlines()]
    assert {pair["chosen"].strip() for pair in pairs} <= {row["chosen"].strip() for row in rows}
    page = (storage / "two" / "report.html").read_text()
    assert "Pairs before and after" in page and f"{pairs[0]['adapter']:+.2f}" in page


def test_reference_is_the_base_computed_alone(storage):
    config = Config.model_validate(door_config(storage / "two"))
    base = load_base(config.model, config.quantization, "float32", CPU)
    manifest = json.loads((storage / "two" / "manifest.json").read_text())
    rows = Rows(open_folder(str(storage / "cache" / manifest["identity"]["data"])), "validation")
    found = load_file(reference_file(storage))["validation"]
    batch = to_tensors(rows.gather(np.array([0])), 0, CPU)
    with torch.no_grad():
        expected, _ = log_probabilities(base, batch)
    assert found[batch["places"]].tolist() == pytest.approx(expected.tolist(), abs=2e-4)


def test_reference_of_the_cache_is_the_one_computed_live(storage):
    """To the bit on the same batches; on those of the training, whose padding is another, to float32's last digits."""
    torch.set_num_threads(1)
    config = Config.model_validate(door_config(storage / "two"))
    model = add_adapter(load_base(config.model, config.quantization, "float32", CPU), config.model, torch.float32, 0)
    fuse(model)
    manifest = json.loads((storage / "two" / "manifest.json").read_text())
    rows = Rows(open_folder(str(storage / "cache" / manifest["identity"]["data"])), "train")
    found, size = load_file(reference_file(storage))["train"], config.training.batch_size
    order = Order(len(rows), config.training.seed, size, 4)

    def live(places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        batch = to_tensors(rows.gather(places), 0, CPU)
        with torch.no_grad(), model.eval().disable_adapter():
            return log_probabilities(model, batch)[0], found[batch["places"]]

    for number in range(8):
        assert torch.equal(*live(np.arange(number * size, (number + 1) * size)))
        assert torch.allclose(*live(order.rows_of_micro_batch(number // 4, number % 4)), rtol=1e-6, atol=1e-5)


def test_model_card_names_the_objective_and_what_its_losses_are_of(storage):
    card = (storage / "two" / "adapter" / "README.md").read_text()
    assert "dpo, beta 0.1, label_smoothing 0.0, rpo_alpha 1.0" in card
    assert "validation loss (dpo, mean over pairs)" in card


def test_adapter_is_judged_by_the_chosen_answers(storage, tmp_path):
    results = tmp_path / "results.json"
    run = str(storage / "two" / "adapter")  # the last, as the last validation
    assert evaluate.main(["--adapter", run, "--num-prompts", "1", "--output", str(results)]) == 0
    found = json.loads(results.read_text())
    of_chosen = [line["eval_nll_loss"] for line in door.metrics(storage / "two") if "eval_nll_loss" in line]
    assert found["with_adapter"]["loss"] == pytest.approx(of_chosen[-1], rel=0.1)  # there pair by pair, here by token
    (*_, last) = (line for line in door.metrics(storage / "two") if "eval_loss" in line)
    assert found["rewards"]["accuracies"] == pytest.approx(last["eval_rewards/accuracies"])
    assert 0.1 * found["rewards"]["margins"] == pytest.approx(last["eval_rewards/margins"], rel=1e-3)
    assert found["with_adapter"]["pairs_right"] > found["base"]["pairs_right"]


def test_adapter_is_judged_by_a_file_of_pairs(storage, tmp_path, capsys):
    lines = Path("data/preferences_sample.jsonl").read_text().splitlines()[:8]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    results = tmp_path / "results.json"
    asked = ["--adapter", str(storage / "two"), "--file", str(tmp_path / "pairs.jsonl"), "--num-prompts", "0"]
    assert evaluate.main([*asked, "--output", str(results)]) == 0
    found = json.loads(results.read_text())
    assert found["num_rows"] == 8 and found["rewards"]["accuracies"] > 0.8
    assert "rewards/accuracies" in capsys.readouterr().out


def door_config(run):
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())


def run_once(arguments: list[str], run: Path) -> None:
    assert many_runs.run(*arguments).returncode == 0
    many_runs.go_back(run)


def run_and_kill(arguments: list[str], run: Path) -> None:
    process = door.start(*arguments)
    door.wait_for_step(run, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    ("begin", "num_workers"), [(run_once, 1), pytest.param(run_and_kill, 4, marks=pytest.mark.slow)]
)
def test_reference_computed_anew_and_a_resumption_end_with_the_same_bits(begin, num_workers, storage, tmp_path):
    """In a storage path of its own nothing is cached; resumed, the run reads the reference."""
    arguments = settings(tmp_path, "again", num_workers)
    begin(arguments, tmp_path / "again")
    made = reference_file(tmp_path).stat().st_mtime_ns
    resumed = many_runs.run(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert reference_file(tmp_path).stat().st_mtime_ns == made
    assert door.sha256(reference_file(tmp_path)) == door.sha256(reference_file(storage))
    assert door.sha256(tmp_path / "again" / "adapter" / WEIGHTS) == door.sha256(storage / "two" / "adapter" / WEIGHTS)


def test_run_from_an_adapter_measures_from_it_and_stops_early_by_rewards_though_the_cache_is_gone(storage, tmp_path):
    more = [f"model.start_from={storage / 'two'}", "training.eval_every_steps=1", "training.early_stopping_patience=3"]
    ended = many_runs.run(*settings(tmp_path, "further", 1, *more, "training.max_steps=3"))
    assert ended.returncode == 0, ended.stderr
    first, of_base = (
        next(line for line in door.metrics(run) if "loss" in line) for run in (tmp_path / "further", storage / "two")
    )
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert first["logps/chosen"] > of_base["logps/chosen"] + 1
    before = reference_file(tmp_path).read_bytes()
    shutil.rmtree(reference_file(tmp_path).parent)
    ended = many_runs.run(*settings(tmp_path, "further", 1, *more, "training.max_steps=9"), "--resume")
    assert ended.returncode == 0, ended.stderr
    assert reference_file(tmp_path).read_bytes() == before
    validations = [line for line in door.metrics(tmp_path / "further") if "eval_loss" in line]
    best = max(validations, key=lambda line: line["eval_rewards/accuracies"])["step"]
    summary = door.summary(tmp_path / "further")
    assert (summary["early"], summary["steps"]) == (True, best + 3)


SINGLE, PAIR = {"instruction": "x", "output": "y"}, {"prompt": "x", "chosen": "a", "rejected": "b"}
LABELLED = {"prompt": "x", "completion": "y", "label": True}


def turns(asked: str, said: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


@pytest.mark.parametrize(
    ("objective", "record", "told"),
    [
        ("dpo", SINGLE, "no `chosen`: training.objective asks for pairs"),
        ("dpo", LABELLED, "no `chosen`: training.objective asks for pairs of answers, chosen and rejected; an answer"),
        ("dpo", {**PAIR, "rejected": "a"}, "chosen and rejected are the same"),
        ("dpo", {"chosen": turns("x", "a"), "rejected": turns("y", "b")}, "different prompts"),
        ("dpo", {**PAIR, "chosen": 3}, "`chosen` is neither a text nor turns"),
        ("simpo", {**PAIR, "chosen": " "}, "`chosen` is empty"),
        ("orpo", {"prompt": "x", "chosen": "a"}, "no `rejected`"),
        ("ipo", {"prompt": "x", "rejected": "a"}, "no `chosen`"),
        ("cpo", {**PAIR, "rejected": None}, "no `rejected`"),
        ("kto", SINGLE, "`label` is not there"),
        ("kto", PAIR, "a pair of answers: training.objective=kto takes single ones with a label; set dpo"),
        ("kto", {**LABELLED, "label": "good"}, "`label` is neither true nor false"),
        ("kto", {**LABELLED, "completion": ""}, "`completion` is empty"),
        ("kto", LABELLED, "all 2 answers are desirable (label: true)"),
        ("kto", {**LABELLED, "label": False}, "all 2 answers are undesirable (label: false)"),
        ("sft", PAIR, "training.objective=sft takes single answers; set dpo"),
        ("sft", LABELLED, "training.objective=sft takes single answers; set kto"),
        ("sft", {**SINGLE, "kto_tag": False}, "training.objective=sft takes single answers; set kto"),
    ],
)
def test_records_of_another_kind_are_refused_before_ray_starts(objective, record, told, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("ray.init", None)
    (tmp_path / "records.json").write_text(json.dumps([record, record]))
    more = [f"data.train_file={tmp_path}/records.json", f"training.objective={objective}", "training.rpo_alpha=0"]
    assert told in refused(train, "-c", "configs/dpo.yaml", f"ray.storage_path={tmp_path}", *more)


def test_objective_is_not_gone_on_to_from_an_adapter_of_another_rank_or_base(trained, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("ray.init", None)
    more = ["-c", "configs/dpo.yaml", f"ray.storage_path={tmp_path}", f"model.start_from={trained}"]
    assert "model.lora_r=16" in refused(train, *more)
    other = tiny_models.save("llama", tmp_path / "base")
    told = refused(train, *more, "model.lora_r=8", f"model.base_model={other}")
    assert str(other) in told and base_model_path("embedded") in told


def test_labels_are_of_answers_alone(tmp_path):
    held = rows_of_pairs(tmp_path / "cache", [[0, 1]])
    table = held.gather(np.array([0]))
    for row, labels in enumerate(table["labels"].to_pylist()):
        number = sum(label != IGNORE_INDEX for label in labels)
        assert number == sum(samples()[place].num_labels for place in (row, row + 2))


@pytest.mark.parametrize("stage", [0, 3])
def test_other_weights_are_computed_with_and_the_trained_ones_stay(stage, tmp_path, process_group):
    base = tiny_models.save("llama", tmp_path / "base")
    config = tiny_models.make_config(base, deepspeed={"zero_stage": stage})
    engine = engines.build(config, tmp_path)
    engines.train(engine, range(2))
    engine.train(False)
    first, weights = tiny_models.logits(engine.module), engine.weights()
    engines.train(engine, range(2, 6))
    engine.train(False)
    trained = tiny_models.logits(engine.module)
    with engine.with_weights(weights):
        engine.train(False)
        assert torch.equal(tiny_models.logits(engine.module), first)
    assert torch.equal(tiny_models.logits(engine.module), trained) and not torch.equal(first, trained)
    assert engines.train(engine, range(6, 8))[-1] < 8
