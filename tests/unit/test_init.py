"""python -m qlora_ray.init: what it chooses, what it says, and what it refuses before it writes a file."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.memory import facts_of, num_lora_parameters
from benchmarks.shapes import SHAPES
from qlora_ray import init
from qlora_ray.cluster import here
from qlora_ray.config import load_config
from qlora_ray.data.lengths import Lengths
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import ModelFacts
from qlora_ray.planning.suggest import Machine, suggest
from qlora_ray.planning.table import SHARE_OF_MEMORY

ASKED = {"model": {"base_model": "embedded"}, "data": {"train_file": "x.jsonl"}}
SIZES = facts_of(SHAPES["llama-8b"])
LLAMA_8B = ModelFacts(
    **vars(SIZES), num_trainable_parameters=num_lora_parameters(SIZES, 16), adapted_layers={"q_proj": 32},
    whole_modules={}, new_tokens={}, num_embedding_rows=SIZES.vocab_size,
)  # fmt: skip
TURNS = [{"role": "user", "content": "Which city is old?"}, {"role": "assistant", "content": "Kyoto is old."}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"what": "the city"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def lengths(num_records: int = 5000, tokens: tuple[int, ...] = tuple(range(100, 500)), **more) -> Lengths:
    num_tokens = np.array(tokens)
    prompts = num_tokens // 2
    known = Lengths(num_records, 0.0, ("messages",), num_tokens, num_tokens - prompts, prompts, prompts)
    return dataclasses.replace(known, **more)


def records(tmp_path, *made: dict) -> str:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


@pytest.fixture
def asked(tmp_path, capsys):
    """Runs the door with --json for some records on the embedded base; returns what it said and the config."""

    def ask(*arguments: str, made: list[dict]) -> tuple[dict, object]:
        data, output = records(tmp_path, *made), str(tmp_path / "my.yaml")
        where = ["--model", "embedded", "--data", data, "-o", output, "--json"]
        assert init.main([*where, *arguments]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out), load_config(tmp_path / "my.yaml")

    return ask


@pytest.mark.parametrize("gib", [8, 12, 16, 24, 80])
@pytest.mark.parametrize("workers", [1, 4])
def test_what_is_suggested_fits_and_cuts_nothing_where_there_is_room(gib, workers):
    made = suggest(ASKED, LLAMA_8B, lengths(), Machine(workers, gib, use_gpu=True))
    assert made.peak_gib <= SHARE_OF_MEMORY * gib
    assert made.config.training.max_length >= 499 and made.num_cut == 0
    assert made.plan.global_batch_size == 16 and made.plan.num_workers == workers


def test_more_memory_gives_more_rows_a_pass_and_less_gives_shorter_rows():
    long = lengths(tokens=tuple(range(1000, 8000, 10)))
    sizes = {}
    for gib in (8, 24):
        training = suggest(ASKED, LLAMA_8B, long, Machine(1, gib, use_gpu=True)).config.training
        sizes[gib] = (training.max_length, training.batch_size)
    assert sizes[24][0] > 7900 and sizes[8][0] < sizes[24][0]


def test_rows_hold_99_of_100_samples_where_few_are_far_longer():
    uneven = lengths(500, tokens=(*range(100, 300), 4000))
    made = suggest(ASKED, LLAMA_8B, uneven, Machine(1, 80, use_gpu=True))
    assert 299 <= made.config.training.max_length <= 320 and made.num_cut == 1


def test_short_samples_share_wide_rows_where_there_are_enough_of_them():
    short = lengths(100_000, tokens=tuple(range(20, 60)))
    assert suggest(ASKED, LLAMA_8B, short, Machine(1, 80, use_gpu=True)).config.training.max_length >= 150


@pytest.mark.parametrize(
    ("num_records", "epochs", "held"),
    [(12, 4, 0.0), (500, 4, 0.1), (5000, 3, 0.1), (50_000, 2, 0.02), (10**6, 1, 1e-3)],
)
def test_epochs_and_held_out_records_follow_from_their_number(num_records, epochs, held):
    config = suggest(ASKED, LLAMA_8B, lengths(num_records), Machine(1, 80, use_gpu=True)).config
    assert (config.training.num_epochs, config.data.validation_split) == (epochs, held)
    assert (config.evaluation.num_prompts > 0) == (held > 0)


def test_few_records_still_make_many_steps():
    plan = suggest(ASKED, LLAMA_8B, lengths(200), Machine(1, 80, use_gpu=True)).plan
    assert plan.steps_per_epoch >= 25 and not any("an epoch is only" in note for note in plan.notes)


def test_cpu_computes_layers_again_only_where_keeping_all_does_not_fit():
    wide = suggest(ASKED, LLAMA_8B, lengths(), Machine(1, 60, use_gpu=False)).config.training
    narrow = suggest(ASKED, LLAMA_8B, lengths(tokens=(2000, 2040)), Machine(1, 17, use_gpu=False)).config.training
    assert (wide.recompute, narrow.recompute) == ("auto", "all")


def test_cpu_is_given_fewer_epochs_of_a_large_base_and_at_least_one():
    small = dataclasses.replace(LLAMA_8B, num_parameters=10**7)
    epochs = [suggest(ASKED, base, lengths(500), Machine(1, 60, use_gpu=False)).config.training.num_epochs
              for base in (small, LLAMA_8B)]  # fmt: skip
    assert epochs == [4, 1]


def test_base_that_does_not_fit_is_refused_with_what_it_takes():
    with pytest.raises(ConfigError, match=r"does not fit on 1 x 4 GiB even with one row of \d+ tokens .*--gpus N"):
        suggest(ASKED, LLAMA_8B, lengths(), Machine(1, 4, use_gpu=True))


def test_answers_fit_the_context_behind_their_prompts():
    base = dataclasses.replace(LLAMA_8B, context_length=512)
    evaluation = suggest(ASKED, base, lengths(tokens=(100, 900)), Machine(1, 80, use_gpu=True)).config.evaluation
    assert 450 + evaluation.max_new_tokens <= 512
    nothing = suggest(ASKED, base, lengths(tokens=(100, 1100)), Machine(1, 80, use_gpu=True)).config.evaluation
    assert nothing.num_prompts == 0


def test_prompts_that_alone_fill_a_row_are_allowed_for_and_counted(tmp_path, asked):
    long = [{"role": "user", "content": "and the cat " * 300}, TURNS[1]]
    said, config = asked(made=[{"messages": TURNS}] * 45 + [{"messages": long}] * 5)
    assert config.data.max_bad_fraction == pytest.approx(0.11)
    assert (
        "max_bad_fraction" in (tmp_path / "my.yaml").read_text()
        and "10 of 100 samples are cut" in said["why"]["length"]
    )


def test_template_is_the_bases_own_unless_it_hides_something(asked):
    said, config = asked(made=[{"messages": TURNS}] * 30)
    assert config.data.chat_template is None and "own chat template" in said["why"]["data"]
    called = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    said, config = asked("--force", made=[{"messages": called, "tools": [TOOL]}] * 30)
    assert config.data.chat_template == "chatml" and "chatml" in said["why"]["data"]


def test_plain_texts_have_no_question_at_the_end(asked):
    said, config = asked(made=[{"text": "The cat sat on the mat. " * 20}] * 30)
    assert config.evaluation.num_prompts == 0 and "texts as they are" in said["why"]["data"]


def test_json_says_what_stands_in_the_file_why_and_what_to_type_next(tmp_path, asked):
    said, config = asked("--gpus", "2", "--gib", "24", made=[{"messages": TURNS}] * 30)
    assert said["file"] == str(tmp_path / "my.yaml") and config.ray.num_workers == 2
    for section, values in said["settings"].items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value
    assert list(said["why"]) == ["base", "data", "length", "memory", "run"]
    assert said["next"] == [
        f"python -m qlora_ray.train -c {tmp_path}/my.yaml ray.run_name=my",
        "python -m qlora_ray.generate --adapter runs/my --chat",
    ]


def test_text_is_a_line_for_each_choice_and_two_commands(tmp_path, capsys):
    data = records(tmp_path, *[{"messages": TURNS}] * 30)
    assert init.main(["--model", "embedded", "--data", data, "-o", str(tmp_path / "my.yaml")]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:6]] == ["base", "data", "length", "memory", "run"]
    assert out.splitlines()[6] == "Next:" and len(out.splitlines()) == 9 and err == ""


def test_names_that_yaml_would_read_otherwise_come_back_as_they_are(tmp_path, capsys):
    odd = tmp_path / "a: b #c"
    odd.mkdir()
    data = records(odd, *[{"messages": TURNS}] * 30)
    assert init.main(["--model", "embedded", "--data", data, "-o", str(tmp_path / "my.yaml")]) == 0
    assert load_config(tmp_path / "my.yaml").data.train_file == data


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--model", "/no/such/base"], "model.base_model=/no/such/base: no such folder"),
        (["--data", "no.jsonl"], "data.train_file=no.jsonl: no such file"),
        (["--data", "BAD"], "no `output` (1x"),
        (["-o", "THERE"], "is there already. Choose another name, or write over it with --force"),
        (["-o", "/no/folder/my.yaml"], "there is no folder /no/folder"),
        (["-o", "/sys/my.yaml"], "-o /sys/my.yaml: Permission denied. Choose another folder"),
        (["--gpus", "0"], "--gpus 0: must be more than 0"),
        (["--gib", "-1"], "--gib -1: must be more than 0"),
        (["--gpus", "64"], "--gpus 64: this machine has"),
        (["--gib", "0.001"], "does not fit on 1 x 0.001 GiB"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, arguments, why):
    (tmp_path / "there.yaml").write_text("mine")
    places = {"THERE": str(tmp_path / "there.yaml"), "BAD": str(tmp_path / "bad.jsonl")}
    (tmp_path / "bad.jsonl").write_text(json.dumps({"instruction": "x"}))
    data = records(tmp_path, *[{"messages": TURNS}] * 30)
    usual = ["--model", "embedded", "--data", data, "-o", str(tmp_path / "my.yaml")]
    assert init.main([*usual, *(places.get(word, word) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1 and why in err
    assert not (tmp_path / "my.yaml").exists() and (tmp_path / "there.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    "names, places",
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("1, GPU-c", [1, 2]), ("GPU-", []), ("0,7,1", [0]), ("-1", [])],
)
def test_gpus_are_those_that_cuda_visible_devices_leaves(names, places):
    gpus = [{"uuid": f"GPU-{letter}", "free_gib": 8.0} for letter in "abc"]
    assert here.visible(gpus, names) == [gpus[place] for place in places]
