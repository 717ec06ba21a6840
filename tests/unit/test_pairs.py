"""Preference records: every shape that people bring becomes two conversations with a common beginning."""

import json

import numpy as np
import pytest
import torch

from qlora_ray.config import Config
from qlora_ray.data.check import check_records
from qlora_ray.data.delivery import Stream, rows_at
from qlora_ray.data.faults import text_of
from qlora_ray.data.order import NO_ROW, Order
from qlora_ray.data.pairs import halves, to_pair, unused_fields
from qlora_ray.data.prepare import prepare
from qlora_ray.data.rows import Rows, as_pairs
from qlora_ray.data.stats import Layout
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.data.work import encoder_of
from qlora_ray.errors import BadRecord, ConfigError
from qlora_ray.storage import open_folder
from qlora_ray.sweep.space import mode_of, sweep_of
from qlora_ray.worker.batches import to_tensors

ASKED = {"role": "user", "content": "Name a city."}
LIMA, LIST = ({"role": "assistant", "content": text} for text in ("Lima", "- Lima\n- Rome"))
HUMAN = {"from": "human", "value": "Name a city."}


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"prompt": [ASKED], "chosen": [LIMA], "rejected": [LIST]}, "messages"),
        ({"prompt": "Name a city.", "chosen": [ASKED, LIMA], "rejected": [ASKED, LIST]}, "messages"),
        ({"prompt": [ASKED], "chosen": [ASKED, LIMA], "rejected": [ASKED, LIST]}, "messages"),
        ({"prompt": "Name a city.", "chosen": [LIMA], "rejected": [LIST]}, "messages"),
        ({"chosen": [ASKED, LIMA], "rejected": [ASKED, LIST]}, "messages"),
        ({"messages": [ASKED], "chosen": LIMA, "rejected": LIST}, "messages"),
        ({"messages": [ASKED], "chosen": "Lima", "rejected": "- Lima\n- Rome"}, "messages"),
        ({"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "Lima"},
          "rejected": {"from": "gpt", "value": "- Lima\n- Rome"}}, "sharegpt"),
        ({"instruction": "Name a city.", "input": "", "chosen": "Lima", "rejected": "- Lima\n- Rome"}, "alpaca"),
        ({"question": "Name a city.", "chosen": "Lima", "rejected": "- Lima\n- Rome"}, "alpaca"),
        ({"instruction": "Name a city.", "chosen_response": "Lima", "rejected_response": "- Lima\n- Rome"}, "alpaca"),
    ],
)  # fmt: skip
def test_each_shape_makes_the_same_pair(record, name):
    pair, found = to_pair(record, "auto")
    assert halves(pair) == [[ASKED, LIMA], [ASKED, LIST]]
    assert found == name and to_pair(record, name) == (pair, name)
    assert unused_fields(record, name, records="pairs") == []


def test_prompt_and_answers_as_texts_follow_each_other_as_they_are():
    chosen, rejected = halves(to_pair({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "auto")[0])
    assert [turn["content"] for turn in (*chosen, *rejected)] == ["2 + 2 =", " 4", "2 + 2 =", " 5"]
    assert [turn["role"] for turn in chosen] == ["prompt", "completion"]


def test_system_and_tools_are_part_of_both():
    tools = [{"name": "f", "parameters": {}}]
    record = {"system": "Be short.", "prompt": [ASKED], "chosen": [LIMA], "rejected": [LIST], "tools": tools}
    for half in halves(to_pair(record, "auto")[0]):
        assert [turn["role"] for turn in half] == ["tools", "system", "user", "assistant"]
    asked = {"system": "Be short.", "question": "Name a city.", "chosen": "Lima", "rejected": "Rome"}
    assert [turn["content"] for turn in halves(to_pair(asked, "auto")[0])[0]] == ["Be short.", "Name a city.", "Lima"]


def test_only_what_follows_the_common_beginning_is_trained_on():
    before = [ASKED, LIMA, {"role": "user", "content": "Another."}]
    pair, _ = to_pair({"chosen": [*before, LIST], "rejected": [*before, LIMA]}, "auto")
    for half in halves(pair):
        assert [turn.get("weight", 1) for turn in half if turn["role"] == "assistant"] == [0, 1]
    assert text_of(pair).count("Another.") == 2


def test_a_function_of_the_users_own_makes_pairs(tmp_path, monkeypatch):
    (tmp_path / "own_pairs.py").write_text(
        "def best(record):\n    chosen, rejected = record['a']\n"
        "    return {'instruction': record['q'], 'chosen': chosen, 'rejected': rejected}\n"
        "def turns(record):\n    return [{'role': 'user', 'content': 'x'}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    record = {"q": "Name a city.", "a": ["Lima", "- Lima\n- Rome"]}
    pair, name = to_pair(record, "own_pairs:best")
    assert halves(pair) == [[ASKED, LIMA], [ASKED, LIST]] and name == "own_pairs:best"
    with pytest.raises(BadRecord, match="mapping with chosen and rejected"):
        to_pair(record, "own_pairs:turns")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "not a JSON object"),
        ({"instruction": "x", "output": "y"}, "no `chosen`: training.objective asks for pairs"),
        ({"messages": [ASKED, LIMA]}, "no `chosen`"),
        ({"prompt": "x", "chosen": "a"}, "no `rejected`"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "x", "chosen": "a", "rejected": " "}, "`rejected` is empty"),
        ({"prompt": "x", "chosen": [], "rejected": "b"}, "`chosen` is empty"),
        ({"chosen": "a", "rejected": "b"}, "no `prompt`"),
        ({"prompt": [ASKED], "chosen": LIMA, "rejected": {**LIST, "content": ""}}, "an assistant turn is empty"),
        ({"chosen": [ASKED, LIMA], "rejected": [{**ASKED, "content": "?"}, LIST]}, "different prompts"),
        ({"chosen": [ASKED, LIMA], "rejected": [ASKED, LIMA, ASKED, LIST]}, "the beginning of the other"),
        ({"chosen": [ASKED], "rejected": [ASKED, LIST]}, "end with the assistant"),
        ({"prompt": "x", "chosen": "a", "rejected": "b\ud800"}, "surrogate"),
    ],
)
def test_unusable_pair_is_refused_with_the_reason(record, reason):
    with pytest.raises(BadRecord, match=reason):
        to_pair(record, "auto")


def test_another_shape_than_data_format_names_is_refused():
    with pytest.raises(BadRecord, match="shape of alpaca, not of data.format=messages"):
        to_pair({"instruction": "x", "chosen": "a", "rejected": "b"}, "messages")


def say(i: int) -> dict:
    return {"instruction": f"Say {i}.", "chosen": f"{i} " + "word " * (i % 7), "rejected": "no " * (i % 5 + 1)}


def prepared(tmp_path, records, packing, shares_prompts=False, objective="dpo", **data):
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    data = {"train_file": str(tmp_path / "pairs.json"), "validation_split": 0.2, **data}
    config = Config.model_validate({"data": data, "training": {"objective": objective, "max_length": 64}})
    check_records(config)
    return prepare(config, open_folder(str(tmp_path / "storage")), Layout(packing, shares_prompts))


def samples_of(table, row: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each sample of a row of tokens."""
    ids, labels, positions = (table[name][row].as_py() for name in ("input_ids", "labels", "position_ids"))
    starts = [i for i, position in enumerate(positions) if position == 0]
    return [(ids[a:b], labels[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def test_a_packed_row_of_pairs_is_two_rows_of_tokens_whose_answers_belong_together(tmp_path):
    made = prepared(tmp_path, [say(i) for i in range(40)], packing=True)
    rows = Rows(made.entry, "train")
    table = rows.gather(np.arange(len(rows)))
    assert table.num_rows == 2 * len(rows) and made.stats.num_samples == 2 * 32
    tokenizer = encoder_of_the_embedded_base().tokenizer
    places, asked = [], set()
    for row in range(0, table.num_rows, 2):
        chosen, rejected = samples_of(table, row), samples_of(table, row + 1)
        assert len(chosen) == len(rejected)
        for (ids, labels), (other_ids, other_labels) in zip(chosen, rejected, strict=True):
            start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
            assert ids[:start] == other_ids[:start] and set(other_labels[:start]) == {IGNORE_INDEX}
            texts = [tokenizer.decode([t for t in one if t != IGNORE_INDEX]) for one in (labels, other_labels)]
            assert texts[1].startswith("no") and not texts[0].startswith("no")
            asked.add(tokenizer.decode(ids[:start]))
        places += table["places"][row].as_py() + table["places"][row + 1].as_py()
        assert max(len(table["input_ids"][one].as_py()) for one in (row, row + 1)) <= 64
    assert sorted(places) == list(range(64)) and len(asked) == 32
    assert made.stats.longest_row == max(map(len, table["input_ids"].to_pylist()))
    assert made.stats.num_tokens == sum(map(len, table["input_ids"].to_pylist()))


def test_a_place_without_a_pair_is_read_and_counts_nothing(tmp_path):
    made = prepared(tmp_path, [say(i) for i in range(10)], packing=False)
    rows = Rows(made.entry, "train")
    table = rows.gather(np.array([3, NO_ROW]))
    assert table["places"].to_pylist() == [[6], [7], [NO_ROW], [NO_ROW]]
    assert {label for row in (2, 3) for label in table["labels"][row].as_py()} == {IGNORE_INDEX}


def test_a_micro_batch_cut_from_a_block_of_many_is_the_one_made_alone(tmp_path):
    made = prepared(tmp_path, [say(i) for i in range(30)], packing=True)
    order = Order(made.stats.num_rows, seed=0, micro_batch_size=2, micro_batches_per_step=1)
    stream = Stream(made.entry, order, rank=0, num_workers=1, first_step=0, last_step=order.steps_per_epoch)
    block = rows_at({"id": np.arange(order.steps_per_epoch)}, stream)
    for step in range(order.steps_per_epoch):
        cut, alone = block.slice(4 * step, 4), rows_at({"id": np.array([step])}, stream)
        assert cut.equals(alone) and set(cut["step"].to_pylist()) == {step}
        ours, theirs = (to_tensors(table, 0, torch.device("cpu")) for table in (cut, alone))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_of_pairs_has_their_answers_behind_one_copy_of_the_prompt(packing, tmp_path):
    both = [prepared(tmp_path, [say(i) for i in range(40)], packing, shares) for shares in (True, False)]
    shared, apart = (Rows(made.entry, "train") for made in both)
    table = shared.gather(np.arange(len(shared)))
    tensors = to_tensors(table, 0, torch.device("cpu"))
    texts = {}
    for row, (ids, labels, positions) in enumerate(
        zip(*(table[name].to_pylist() for name in ("input_ids", "labels", "position_ids")), strict=True)
    ):
        starts = [i for i, place in enumerate(positions) if not i or place != positions[i - 1] + 1]
        assert len(starts) == len(table["places"][row]) and len(ids) <= 128
        for number, (a, b) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True)):
            begin = ids[starts[number - 1] :][: positions[a]]
            assert (number % 2 == 0) == (not begin) == (not table["is_rejected"][row][number].as_py())
            texts[tuple(begin + ids[a:b])] = [t for t in labels[a:b] if t != IGNORE_INDEX]
    assert len(tensors["places"]) == 64 and tensors["label_counts"].sum() == len(tensors["label_places"])
    halves = [half.to_pylist() for half in apart.halves(np.arange(len(apart)))]
    alone = {tuple(s["input_ids"]): [t for t in s["labels"] if t != IGNORE_INDEX] for half in halves for s in half}
    assert texts == alone
    assert both[0].stats.num_tokens == sum(map(len, table["input_ids"].to_pylist()))
    assert both[1].stats.num_tokens - both[0].stats.num_tokens == int(tensors["num_shared"].sum()) > 32
    assert both[0].stats.num_label_tokens == both[1].stats.num_label_tokens
    assert both[0].stats.longest_row == max(map(len, table["input_ids"].to_pylist()))
    assert by_text(shared) == by_text(apart)


def by_text(rows: Rows) -> list[str]:
    halves = (half.to_pylist() for half in rows.halves(np.arange(len(rows))))
    return sorted(map(str, zip(*halves, strict=True)))


def test_weights_repeat_whole_pairs(tmp_path):
    (tmp_path / "twice.json").write_text(json.dumps([say(i) for i in range(6)]))
    files = [{"path": str(tmp_path / "twice.json"), "weight": 2.0}]
    made = prepared(tmp_path, [], packing=False, train_file=files, validation_split=0)
    rows = Rows(made.entry, "train")
    held = [rows.samples_of(np.array([row])).tolist() for row in range(len(rows))]
    assert held == [[first, first + 1] for first in (0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10)]


def test_rows_of_pairs_hold_the_chosen_samples_first():
    offsets, samples = as_pairs(np.array([0, 2, 3]), np.array([4, 8, 0]), shares_prompts=False)
    assert offsets.tolist() == [0, 4, 6] and samples.tolist() == [4, 8, 5, 9, 0, 1]


def test_pair_that_is_the_same_once_cut_is_rejected_and_counted(tmp_path):
    long = {"instruction": "Say much.", "chosen": "word " * 80 + "a", "rejected": "word " * 80 + "b"}
    made = prepared(tmp_path, [say(i) for i in range(20)] + [long], packing=False, max_bad_fraction=0.1)
    (reason,) = {reason for samples in made.train for reason in samples.rejected}
    assert "the same within training.max_length" in reason


def test_single_answers_are_refused_by_an_objective_of_pairs_and_pairs_by_sft(tmp_path):
    with pytest.raises(ConfigError, match="no `chosen`: training.objective asks for pairs"):
        prepared(tmp_path, [{"instruction": "x", "output": "y"}], packing=False)
    with pytest.raises(ConfigError, match="training.objective=sft takes single answers; set dpo"):
        prepared(tmp_path, [say(1)], packing=False, objective="sft")


def test_held_out_prompts_expect_the_chosen_answer(tmp_path):
    made = prepared(tmp_path, [say(i) for i in range(20)], packing=True)
    prompts = json.loads((made.entry / "prompts.json").read_bytes())
    assert len(prompts) == 4
    for prompt in prompts:
        number = int(prompt["prompt"].removeprefix("Say ").removesuffix("."))
        assert prompt["expected"].split() == say(number)["chosen"].split()


def encoder_of_the_embedded_base():
    from qlora_ray.data.prepare import make_recipe

    return encoder_of(make_recipe(Config()))


SWEEP = {"parameters": {"training.beta": {"choice": [0.1, 0.3]}}}


def test_a_sweep_looks_for_the_highest_margin():
    metric = "eval_rewards/margins"
    training = {"objective": "dpo", "metric_for_best_model": metric}
    config = Config.model_validate({"training": training, "sweep": {**SWEEP, "metric": metric}})
    assert mode_of(sweep_of(config)) == "max"


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"training": {"beta": 0.5}}, "training.beta=0.5: training.objective=sft does not use it"),
        ({"training": {"objective": "ipo", "label_smoothing": 0.1}}, "training.label_smoothing=0.1"),
        ({"training": {"objective": "orpo", "reference": "base"}}, "training.reference=base"),
        ({"training": {"objective": "dpo", "reference": "start"}}, "there is no model.start_from"),
        ({"training": {"objective": "dpo"}, "data": {"train_on": "everything"}}, "data.train_on=everything"),
        ({"training": {"objective": "dpo"}, "data": {"keep_thoughts": "all"}}, "data.keep_thoughts=all"),
        ({"training": {"objective": "dpo"}, "data": {"format": "text"}}, "data.format=text"),
        (
            {"training": {"objective": "kto", "metric_for_best_model": "eval_rewards/accuracies"}},
            "training.objective=kto compares no two answers",
        ),
        ({"training": {"objective": "dpo", "desirable_weight": 2}}, "training.desirable_weight=2"),
        ({"training": {"share_prompts": False}}, "training.share_prompts=False"),
        ({"training": {"metric_for_best_model": "eval_rewards/margins"}}, "training.objective=sft has no pairs"),
        ({"training": {"objective": "dpo"}, "sweep": {**SWEEP, "metric": "eval_perplexity"}}, "eval_perplexity"),
        ({"training": {"objective": "dpo"}, "sweep": {**SWEEP, "metric": "eval_rewards/margins"}}, "Set both to the"),
    ],
)
def test_setting_that_the_objective_does_not_use_is_refused_by_name(sections, told):
    with pytest.raises(ValueError) as refused:
        Config.model_validate(sections)
    assert told in str(refused.value)
