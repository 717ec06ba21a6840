"""Whole runs through the door: real Ray, real ZeRO-3, real NF4, on CPU."""

import json
import math
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_ray import __version__, evaluate, train
from qlora_ray.config import base_model_path, find_file
from qlora_ray.data.order import Order, held_out
from qlora_ray.data.rows import Rows, sample_digest
from qlora_ray.storage import open_folder
from tests.integration import door, plain_loop

STEPS, BATCH_SIZE, LEARNING_RATE, SEED = 20, 2, 1e-3, 3
FLOAT32_NATS = 2**-20  # the spacing of float32 between 8 and 16, where the largest logits are: no loss is known better
EACH_STEP = ("checkpoint.every_steps=1", f"checkpoint.keep={STEPS}")


def settings(storage, name, num_workers, accumulation, *more):
    return [
        "-c", "configs/quickstart.yaml", f"ray.storage_path={storage}", f"ray.run_name={name}",
        f"ray.num_workers={num_workers}", f"training.gradient_accumulation_steps={accumulation}",
        f"training.batch_size={BATCH_SIZE}", f"training.max_steps={STEPS}", f"training.learning_rate={LEARNING_RATE}",
        f"training.seed={SEED}", "model.lora_dropout=0", "logging.every_steps=1", "checkpoint.every_steps=5",
        "checkpoint.keep=9", "training.eval_every_steps=10", "evaluation.num_prompts=4", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_worker():
    """By default one worker has the threads of two; the bits are those of one number of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two_workers(storage):
    """An uninterrupted run of two workers."""
    ended = door.run(*settings(storage, "two", 2, 1, *EACH_STEP))
    assert ended.returncode == 0, ended.stderr
    return storage / "two", ended


def test_run_directory_holds_what_the_contract_names(two_workers):
    run, _ = two_workers
    files = {path.name for path in run.iterdir()}
    assert {"config.yaml", "plan.json", "manifest.json", "metrics.jsonl", "report.html", "summary.json", "checkpoints",
            "adapter", "adapter_best"} <= files  # fmt: skip
    assert door.summary(run)["status"] == "done"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step_{s:08d}" for s in range(1, STEPS + 1)]
    assert not [path for path in run.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".pth")]


def test_metrics_have_one_line_a_step_and_the_documented_names(two_workers):
    run, _ = two_workers
    lines = [line for line in door.metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"epoch", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "samples_per_second",
            "peak_memory_gib", "num_tokens", "num_label_tokens", "sample_digests"} <= lines[0].keys()  # fmt: skip
    validations = [line for line in door.metrics(run) if "eval_loss" in line]
    assert [line["step"] for line in validations] == [10, 20]
    assert all(math.isclose(v["eval_perplexity"], math.exp(v["eval_loss"])) for v in validations)


def test_user_sees_plan_progress_and_result_but_no_chatter(two_workers):
    _, ended = two_workers
    assert ended.stdout.startswith(f"qlora_ray {__version__}: starting Ray and the workers for ")
    for expected in ("ZeRO stage 3", "step 20/20", "exact match on 4 held-out prompts", "report.html"):
        assert expected in ended.stdout
    for noise in ("Traceback", "WARNING", "(RayTrainWorker", "(TrainController", "kernels-community", "PlacementGroup"):
        assert noise not in ended.stdout + ended.stderr


def test_evaluate_reproduces_exact_match_and_loss_of_the_run(two_workers, tmp_path, capsys):
    run, ended = two_workers
    results = tmp_path / "results.json"
    assert evaluate.main(["--adapter", str(run / "adapter"), "--output", str(results)]) == 0
    found, summary = json.loads(results.read_text()), door.summary(run)
    assert found["with_adapter"]["exact_match"] == summary["exact_match_adapter"]
    assert found["base"]["exact_match"] == summary["exact_match_base"]
    assert found["with_adapter"]["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5, abs=FLOAT32_NATS)
    samples = json.loads((run / "samples.json").read_text())
    assert [answer["with_adapter"] for answer in found["answers"]] == [sample["adapter"] for sample in samples]
    assert f"exact match on 4 held-out prompts: 0% before, {summary['exact_match_adapter']:.0%} after" in ended.stdout


def test_adapters_carry_record_card_and_answers_through_training(two_workers):
    run, _ = two_workers
    for name in ("adapter", "adapter_best"):
        record = json.loads((run / name / "qlora_ray.json").read_text())
        assert record["base"]["base_model"] == "embedded" and record["run_name"] == "two"
        assert record["data"]["fingerprint"] in (run / name / "README.md").read_text()
    assert "exact match with the adapter" in (run / "adapter" / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "samples_by_step.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 10, 20, 20]
    assert {line["prompt"] for line in lines if line["step"] == 10} == {line["prompt"] for line in lines[2:]}


def test_one_worker_that_loads_the_base_whole_gives_the_bits_of_two_that_load_their_shares(two_workers, storage):
    run, _ = two_workers
    ended = door.run(*settings(storage, "one", 1, 2))
    assert ended.returncode == 0, ended.stderr
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors"):
        assert door.sha256(storage / "one" / file) == door.sha256(run / file), file
    assert door.losses(storage / "one") == door.losses(run)
    logs = [(one / "logs" / "worker_0.log").read_text() for one in (run, storage / "one")]
    assert ["base model: loaded, each worker its share" in log for log in logs] == [True, False]


def rows_read(run, batch_size: int = BATCH_SIZE) -> tuple[Rows, Order]:
    """The rows that a run of two workers read, and their order."""
    fingerprint = json.loads((run / "manifest.json").read_text())["identity"]["data"]
    rows = Rows(open_folder(str(run.parent / "cache" / fingerprint)), "train")
    return rows, Order(len(rows), SEED, batch_size, 2)


def test_digests_in_the_metrics_are_those_of_the_samples_that_each_step_should_read(two_workers):
    run, _ = two_workers
    rows, order = rows_read(run)
    logged = [digest for line in door.metrics(run) for digest in line.get("sample_digests", [])]
    assert logged == [sample_digest(rows, order, step) for step in range(STEPS)]


def test_run_in_given_order_reads_the_samples_as_the_file_has_them(storage, refused):
    ended = door.run(*settings(storage, "given", 1, 2, "data.order=given", "training.max_steps=2"))
    assert ended.returncode == 0, ended.stderr
    rows, order = rows_read(storage / "given")
    given = replace(order, is_shuffled=False)
    logged = [digest for line in door.metrics(storage / "given") for digest in line.get("sample_digests", [])]
    assert logged == [sample_digest(rows, given, step) for step in range(2)]
    read = np.concatenate([rows.samples_of(given.rows_of_step(step).T.ravel()) for step in range(2)])
    assert read.tolist() == sorted(read.tolist()) and len(read) >= 2 * 2 * BATCH_SIZE
    message = refused(train, *settings(storage, "given", 1, 2, "training.max_steps=2"), "--resume")
    assert "begun with another order: data.order=shuffled (before: given)" in message


def places(run, first: plain_loop.Place) -> list[plain_loop.Place]:
    """Where each step of a run began, from its checkpoints."""
    found = [first]
    for step in range(1, STEPS + 1):
        folder = run / "checkpoints" / f"step_{step:08d}"
        weights, moments = load_file(folder / "adapter.safetensors"), load_file(folder / "optimizer.safetensors")
        by_name = {name: {key: moments[f"{name}/{key}"] for key in plain_loop.MOMENTS} for name in weights}
        found.append(plain_loop.Place(step, weights, by_name))
    return found


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], beyond: dict[str, torch.Tensor]) -> float:
    """Distance of two in units of how far theirs is from `beyond`, all parameters together."""
    apart, whole = (sum(float((some[n] - theirs[n]).norm() ** 2) for n in theirs) for some in (ours, beyond))
    return (apart / whole) ** 0.5


def assert_each_step_is_a_plain_loops(run, batch_size: int = BATCH_SIZE) -> None:
    """Each step from where it began, with what one process, PyTorch and PEFT make of its samples, one at a time.

    Not two trajectories: where a gradient is next to 0, AdamW makes a whole step of its rounding.
    """
    records = plain_loop.read(str(find_file("data/sample_data.json")))
    rows, order = rows_read(run, batch_size)
    # Every record is usable, so that a sample's number is its record's.
    batches = [rows.samples_of(order.rows_of_step(k).T.ravel()).tolist() for k in range(STEPS)]
    read = [number for batch in batches for number in batch]
    assert len(read) >= STEPS * 2 * batch_size and len(set(read)) == len(read)
    assert not set(read) & set(held_out(len(records), 0.1, SEED).tolist())
    # Warmup over 3% of 20 steps is one step at the peak; then a cosine over the other 19 down to 0.
    rates = [LEARNING_RATE] + [LEARNING_RATE * (1 + math.cos(math.pi * k / 19)) / 2 for k in range(19)]
    base = base_model_path("embedded")
    model = plain_loop.load(base, {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}, SEED)
    began = places(run, plain_loop.start(model))
    logged = [line for line in door.metrics(run) if "loss" in line]
    assert [line["learning_rate"] for line in logged] == pytest.approx(rates, rel=1e-9)
    for k, loss in enumerate(plain_loop.follow(base, records, batches, model, began[:-1])):
        assert logged[k]["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=FLOAT32_NATS), k
        theirs, ours = plain_loop.step(model, began[k], loss, rates[k], max_norm=1.0), began[k + 1]
        for key in plain_loop.MOMENTS:
            mine, other = ({name: both[key] for name, both in place.moments.items()} for place in (ours, theirs))
            # float32 gradients are good to 1e-5. Without a token, or the clipping, they are off by 1e-2.
            assert far(mine, other, {name: 0 * value for name, value in other.items()}) < 1e-3, (k, key)
        assert far(ours.weights, theirs.weights, began[k].weights) < 1e-3, k


def test_plain_loop_makes_the_steps_of_two_workers(storage):
    ended = door.run(*settings(storage, "padded", 2, 1, "training.packing=false", "training.batch_size=4", *EACH_STEP))
    assert ended.returncode == 0, ended.stderr
    assert_each_step_is_a_plain_loops(storage / "padded", batch_size=4)


def test_plain_loop_over_single_samples_makes_the_steps_of_two_workers_with_packed_rows(two_workers):
    run, _ = two_workers
    assert_each_step_is_a_plain_loops(run)


def test_interrupted_and_resumed_run_equals_uninterrupted_run(two_workers, storage):
    whole, _ = two_workers
    process = door.start(*settings(storage, "stopped", 2, 1))
    door.wait_for_step(storage / "stopped", 7, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "--resume" in out and "Traceback" not in err
    stopped_at = door.summary(storage / "stopped")["steps"]
    assert 7 <= stopped_at < STEPS
    assert (storage / "stopped" / "checkpoints" / f"step_{stopped_at:08d}" / "manifest.json").exists()

    ended = door.run(*settings(storage, "stopped", 2, 1), "--resume")
    assert ended.returncode == 0, ended.stderr
    resumed = storage / "stopped"
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step_00000020/optimizer.safetensors"):
        assert door.sha256(resumed / file) == door.sha256(whole / file), file
    assert door.losses(resumed) == door.losses(whole)
    assert [line["step"] for line in door.metrics(resumed) if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_killed_worker_is_replaced_and_the_result_is_the_same(two_workers, storage):
    import os

    import psutil

    whole, _ = two_workers
    process = door.start(*settings(storage, "killed", 2, 1))
    door.wait_for_step(storage / "killed", 8, process)
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert len(door.summary(storage / "killed")["failures"]) == 1
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step_00000020/optimizer.safetensors"):
        assert door.sha256(storage / "killed" / file) == door.sha256(whole / file), file


def test_run_that_crashed_between_two_lines_tells_what_an_undisturbed_one_tells(storage):
    """With the default intervals: a line each tenth step, and wherever a checkpoint is begun."""
    asked = (*settings(storage, "counted", 1, 1, "checkpoint.every_steps=6", "evaluation.num_prompts=0"),
             "logging.every_steps=10", "training.eval_every_steps=20")  # fmt: skip
    assert door.run(*asked).returncode == 0
    run = storage / "counted"
    summary, told = door.summary(run), door.told(run)
    assert [line["step"] for line in told if "loss" in line] == [1, 6, 10, 12, 18, 20]
    parts, until = summary["seconds"]["of_start"], summary["seconds"]["first_step_done"]
    of_worker = sum(parts[name] for name in ("base", "adapter", "guard", "engine", "first step"))
    assert min(parts["Ray"], of_worker) > 0 and of_worker + parts["workers"] < until
    assert sum(line.get("num_tokens", 0) for line in told) == summary["num_tokens"]
    for step in (18, 20):  # as if it had crashed at step 17: its lines up to 12 are there
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    ended = door.run(*asked, "--resume")
    assert ended.returncode == 0, ended.stderr
    assert door.told(run) == told
    again = door.summary(run)
    assert [name for name, value in summary.items() if name != "seconds" and again[name] != value] == []


def test_resume_refuses_another_lora_shape(two_workers, storage, refused):
    run, _ = two_workers
    before = sorted(path for path in run.rglob("*"))
    assert "lora_r" in refused(train, *settings(storage, "two", 2, 1, "model.lora_r=8"), "--resume")
    assert sorted(path for path in run.rglob("*")) == before


def contents(run) -> dict:
    """Digest of every file of a run directory but its logs, which Ray appends to."""
    return {path: door.sha256(path) for path in run.rglob("*") if path.is_file() and "logs" not in path.parts}


def test_finished_run_resumed_as_it_was_says_so_and_touches_nothing(two_workers, storage, capsys):
    run, _ = two_workers
    before = contents(run)
    assert train.main([*settings(storage, "two", 2, 1, "logging.every_steps=5"), "--resume"]) == 0
    assert f"Done already: all of this run, up to step {STEPS}" in capsys.readouterr().out
    assert contents(run) == before


def test_finished_run_resumed_with_another_learning_rate_is_refused_by_name_and_stays_as_it_is(
    two_workers, storage, refused
):
    run, _ = two_workers
    before = contents(run)
    message = refused(train, *settings(storage, "two", 2, 1, "training.learning_rate=5e-4"), "--resume")
    assert message.startswith("error: --resume: training.learning_rate=0.0005 (before: 0.001): no step is left")
    assert contents(run) == before


def test_finished_run_resumed_with_more_steps_trains_them_and_tells_the_rate_from_there_on(two_workers, storage):
    run, _ = two_workers
    shutil.copytree(run, storage / "longer")
    ended = door.run(*settings(storage, "longer", 2, 1, f"training.max_steps={STEPS + 4}"), "--resume")
    assert ended.returncode == 0, ended.stderr
    rates = {line["step"]: line["learning_rate"] for line in door.metrics(storage / "longer") if "loss" in line}
    assert max(rates) == STEPS + 4 and rates[STEPS + 1] > 2 * rates[STEPS]
    assert f"Changed from step {STEPS + 1} on: training.max_steps {STEPS} -> {STEPS + 4}" in ended.stdout
    told = f"from step {STEPS + 1} on: {rates[STEPS + 1]:.3g} (the run so far ended at {rates[STEPS]:.3g})"
    assert told in ended.stdout
    changes = json.loads((storage / "longer" / "manifest.json").read_text())["changes"]
    assert changes == [{"after_step": STEPS, "changed": {"training.max_steps": [STEPS, STEPS + 4]}}]


def test_more_workers_than_the_machine_holds_are_refused(storage, refused):
    message = refused(train, *settings(storage, "many", 64, 1))
    assert "ray.num_workers=64" in message and "the cluster holds" in message
    assert not (storage / "many").exists()


def test_early_stopping_ends_a_run_that_no_longer_improves_and_debug_shows_every_parameter(storage):
    still = ["training.learning_rate=1e-30", "training.early_stopping_patience=1", "training.eval_every_steps=2"]
    asked = settings(storage, "early", 1, 1, *still, "evaluation.num_prompts=0", "training.packing=false")
    ended = door.run(*asked, "--debug")
    assert ended.returncode == 0, ended.stderr
    summary, told = door.summary(storage / "early"), door.told(storage / "early")
    assert (summary["status"], summary["early"], summary["steps"]) == ("done", True, 4)
    assert train.main([*asked, "--resume"]) == 0
    assert door.told(storage / "early") == told and door.summary(storage / "early")["steps"] == 4
    assert (storage / "early" / "adapter_best" / "adapter_model.safetensors").exists()
    table = [line for line in (ended.stdout + ended.stderr).splitlines() if "q_proj" in line]
    assert any("4-bit" in line and "no" in line for line in table)
    assert any("float32" in line and "lora_A" in line and "yes" in line for line in table)


def test_manifest_names_versions_and_data(two_workers):
    run, _ = two_workers
    manifest = json.loads((run / "manifest.json").read_text())
    assert {"torch", "ray", "deepspeed", "bitsandbytes", "peft", "transformers"} <= manifest["versions"].keys()
    assert len(manifest["identity"]["data"]) == 32
