"""Records of many shapes to messages, and what is refused with which reason."""

import json

import pytest

from qlora_ray.data.formats import convert, load_function, to_messages
from qlora_ray.errors import BadRecord, ConfigError

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a city."},
    {"role": "assistant", "content": "Kyoto, 京都."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Lima"},
]


def test_alpaca_record_becomes_a_question_and_an_answer():
    wanted = [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert to_messages(GOOD, "auto") == to_messages(GOOD, "alpaca") == wanted
    assert to_messages({**GOOD, "input": ""}, "auto")[0]["content"] == "Add."
    assert to_messages({**GOOD, "system": "Be exact."}, "auto")[0] == {"role": "system", "content": "Be exact."}


def test_messages_record_stays_as_it_is():
    assert to_messages({"messages": TURNS, "id": 7}, "auto") == TURNS


def test_openai_content_parts_and_weights_are_understood():
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a city."}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Lima", "weight": 1}]
    assert to_messages({"messages": turns}, "auto") == [TURNS[1], TURNS[4]]
    quiet = [TURNS[1], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    assert to_messages({"messages": quiet}, "auto") == quiet


def test_sharegpt_record_is_renamed():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    assert to_messages({"conversations": turns}, "auto") == TURNS
    assert to_messages({"conversations": turns[1:], "system": "Be brief."}, "sharegpt") == TURNS


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]},
        {"content": "", "tool_calls": json.dumps([CALL])},
        {"content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
    ],
)
def test_calls_of_every_shape_become_one(turn):
    made = to_messages({"messages": [TURNS[1], {"role": "assistant", **turn}]}, "auto")
    assert made == [TURNS[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    "tools",
    [[TOOL], [TOOL["function"]], json.dumps([TOOL]), [json.dumps(TOOL["function"])],
     [{"type": "function", **TOOL["function"]}]],
)  # fmt: skip
@pytest.mark.parametrize("field", ["tools", "functions"])
def test_tools_of_every_shape_become_one_and_come_first(tools, field):
    made = to_messages({"messages": TURNS, field: tools}, "auto")
    assert made == [{"role": "tools", "content": "", "tools": [TOOL]}, *TURNS]


def test_a_call_that_follows_what_the_assistant_says_is_of_the_same_turn():
    said = [("human", "x"), ("gpt", "I look."), ("function_call", '{"name": "f", "arguments": {"a": 1}}'),
            ("observation", "2"), ("gpt", "It is 2.")]  # fmt: skip
    made = to_messages({"conversations": [{"from": who, "value": value} for who, value in said]}, "auto")
    assert [turn["role"] for turn in made] == ["user", "assistant", "tool", "assistant"]
    assert made[1] == {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_of_every_name_become_one(field):
    made = to_messages({"messages": [TURNS[1], {**TURNS[4], field: "South!"}]}, "auto")
    assert made[1] == {**TURNS[4], "reasoning_content": "South!"}


def test_weight_0_keeps_a_turn_of_sharegpt_out_of_the_loss():
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", "weight": 0}] * 2
    turns[3] = {"from": "gpt", "value": "z"}
    assert [turn.get("weight") for turn in to_messages({"conversations": turns}, "auto")] == [None, 0, None, None]


def test_prompt_and_completion_stay_raw_texts_or_become_turns():
    raw = to_messages({"prompt": "2 + 2 =", "completion": " 4"}, "auto")
    assert raw == [{"role": "prompt", "content": "2 + 2 ="}, {"role": "completion", "content": " 4"}]
    assert to_messages({"prompt": TURNS[:2], "completion": TURNS[2:3]}, "auto") == TURNS[:3]


def test_text_record_is_one_raw_text():
    assert to_messages({"text": "Once."}, "auto") == [{"role": "text", "content": "Once."}]


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({**GOOD, "text": "the same as one text"}, "alpaca"),
        ({"messages": TURNS, "prompt": "x"}, "messages"),
        ({"messages": None, "text": "x"}, "text"),
        ({"prompt": "x", "completion": "y"}, "prompt_completion"),
    ],
)
def test_format_is_told_by_the_fields(record, name):
    assert convert(record, "auto")[1] == name


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "x"}, "no `output`"),
        ({"instruction": "x", "output": "  "}, "`output` is empty"),
        ({"instruction": 5, "output": "x"}, "`instruction` is empty or not a text"),
        ({**GOOD, "input": ["x"]}, "`input` is not a text"),
        ({**GOOD, "system": 5}, "`system` is empty or not a text"),
        ({**GOOD, "output": "\ud800"}, "surrogate"),
        ({**GOOD, "output": "\udcff"}, "not UTF-8"),
        ("text", "not a JSON object"),
        ({"a": 1}, "no format has these fields"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": TURNS[:2]}, "end with the assistant"),
        ({"messages": TURNS[2:3]}, "alternate"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "a turn is not"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": ""}]}, "an assistant turn is empty"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": [{"type": "image"}]}]}, "multi-modal"),
        ({"messages": [TURNS[1], {**TURNS[2], "weight": 0.5}]}, "`weight` is not 0 or 1"),
        ({"messages": [TURNS[1], {**TURNS[2], "weight": 0}]}, "every assistant turn has weight 0"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "a turn is not {from"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": None}]}, "a turn is not"),
        ({"prompt": "x", "completion": ""}, "`completion` is empty"),
        ({"text": 5}, "`text` is empty or not a text"),
        ({"messages": "user: hi"}, "`messages` is a text, not a list of turns"),
        ({"conversations": "hi"}, "`conversations` is a text, not a list of turns"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "a preference record"),
        ({"prompt": "x", "completion": "a", "label": False}, "set kto"),
        ({"messages": [{"role": "user", "content": "x"}], "kto_tag": True}, "set kto"),
        ({"messages": TURNS, "images": ["a.png"]}, "a multi-modal record"),
        ({"messages": TURNS, "tools": "{oops"}, "`tools` is not JSON"),
        ({"messages": TURNS, "tools": [{"description": "x"}]}, "a tool is not"),
        ({"messages": [TURNS[1], {"role": "assistant", "tool_calls": [{"name": ""}]}]}, "a tool call is not"),
        (
            {"messages": [TURNS[1], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "arguments are not a JSON object",
        ),
        ({"messages": [TURNS[1], {"role": "assistant", "reasoning": 5, "content": "x"}]}, "thought is not a text"),
        (
            {"messages": [TURNS[1], {"role": "assistant", "reasoning": "Hm.", "content": None}]},
            "an assistant turn is empty",
        ),
        ({"messages": [TURNS[1], {"role": "tool", "content": "x"}, TURNS[2]]}, "alternate"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f(1)"}]},
            "a function_call is not JSON",
        ),
    ],
)
def test_unusable_record_is_refused_with_the_reason(record, reason):
    with pytest.raises(BadRecord, match=reason):
        to_messages(record, "auto")


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A module of the user's own with functions from record to messages."""
    (tmp_path / "own_shapes.py").write_text(
        "def qa(record):\n"
        "    return [{'role': 'user', 'content': record['q']}, {'role': 'assistant', 'content': record['a']}]\n"
        "def story(record):\n    return [{'role': 'text', 'content': record['body']}]\n"
        "def nothing(record):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_of_the_users_own_is_a_format(shapes):
    assert to_messages({"q": "Name a city.", "a": "Lima"}, "own_shapes:qa") == [TURNS[1], TURNS[4]]
    assert to_messages({"body": "Once."}, "own_shapes:story") == [{"role": "text", "content": "Once."}]


def test_what_a_function_cannot_make_or_makes_wrong_is_a_bad_record(shapes):
    with pytest.raises(BadRecord, match="own_shapes:qa raises KeyError") as refused:
        to_messages({"q": "x"}, "own_shapes:qa")
    assert refused.value.detail == "'a'"
    with pytest.raises(BadRecord, match="empty"):
        to_messages({"q": "x", "a": " "}, "own_shapes:qa")
    with pytest.raises(BadRecord, match="not a list of turns"):
        to_messages({}, "own_shapes:nothing")


def test_a_function_that_is_not_there_is_refused_by_name(shapes):
    with pytest.raises(ConfigError, match="data.format=own_shapes:missing: own_shapes has no function missing"):
        load_function("own_shapes:missing")
    with pytest.raises(ConfigError, match="data.format=no.such:thing: cannot be imported"):
        load_function("no.such:thing")
