"""Every kind of record through every kind of template: what is trained on, to the character, or why it is not.

tests/templates/*.jinja behave as the templates of these families do, in our own words; trained.json beside them holds
what each trains on. After a change that is meant: python -m tests.unit.test_template_matrix, and read the difference.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from qlora_ray.config import base_model_path
from qlora_ray.data.formats import to_messages, to_question
from qlora_ray.data.missing import OTHER_PROMPT, SAID_BY
from qlora_ray.data.template import NAMED, fit_template
from qlora_ray.data.tokenize import IGNORE_INDEX, Encoder, load_tokenizer, prompt_ids
from qlora_ray.data.turns import split_tools
from qlora_ray.errors import BadRecord

FOLDER = Path(__file__).parent.parent / "templates"
FILES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
TEMPLATES = {**FILES, **NAMED}
EOS = {
    "qwen25": "<|im_end|>", "qwen3": "<|im_end|>", "qwen3_thinking": "<|im_end|>", "qwen3_coder": "<|im_end|>",
    "llama31": "<|eot_id|>", "llama3": "<|eot_id|>", "llama2": "</s>", "mistral": "</s>", "mistral_small": "</s>",
    "gemma2": "<eos>", "gemma3": "<eos>", "phi3": "<|endoftext|>", "phi4_mini": "<|endoftext|>",
    "deepseek_v3": "<|end_of_sentence|>", "deepseek_r1": "<|end_of_sentence|>", "glm45": "<|endoftext|>",
    "gpt_oss": "<|return|>", "kimi_k2": "<|im_end|>", "granite": "<|end_of_text|>",
    "command_r": "<|END_OF_TURN_TOKEN|>", "zephyr": "</s>", "smollm3": "<|im_end|>", "vicuna": "</s>",
}  # fmt: skip
ORDINARY = {"text_closer", "plain", "chatml"}  # whose markers the tokenizer does not have as tokens
TAGGED = sorted(name for name, text in FILES.items() if "endgeneration" in text)

U = {"role": "user", "content": "Ask alpha."}
U2 = {"role": "user", "content": "Ask beta."}
S = {"role": "system", "content": "Rule gamma."}
TOOLS = [
    {"type": "function", "function": {
        "name": name, "description": f"Does {name}.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}
    for name in ("find_delta", "open_kappa")
]  # fmt: skip
RESULT = {"role": "tool", "content": "result sigma"}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name="find_delta", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments or {"place": "Lima"}}}


CALL = call(place="Oslo", count=3, tags=["x", "é"])
AS_TEXT = {"type": "function", "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
RECORDS = {
    "one turn": {"messages": [U, says("Tell omega.")]},
    "system": {"messages": [S, U, says("Tell omega.")]},
    "two turns": {"messages": [U, says("Tell omega."), U2, says("Tell psi.")]},
    "weight 0": {"messages": [U, says("Tell omega.", weight=0), U2, says("Tell psi.")]},
    "spaces": {"messages": [U, says("\n Tell omega.\n"), U2, says("  Tell psi.")]},
    "thought": {"messages": [U, says("Tell omega.", reasoning_content="Think chi.")]},
    "thought in content": {"messages": [U, says("<think>\nThink chi.\n</think>\n\nTell omega.")]},
    "two thoughts": {"messages": [U, says("Tell omega.", thinking="Think chi."), U2,
                                  says("Tell psi.", reasoning="Think rho.")]},
    "tools unused": {"tools": TOOLS, "messages": [S, U, says("Tell omega.")]},
    "call": {"tools": TOOLS, "messages": [U, says(None, tool_calls=[CALL])]},
    "call as text": {"tools": json.dumps(TOOLS), "messages": [U, says("", tool_calls=[AS_TEXT])]},
    "text and call": {"tools": TOOLS, "messages": [
        U, says("Tell omega.", tool_calls=[CALL]), RESULT, says("Tell psi.")]},
    "call, result, answer": {"tools": TOOLS, "messages": [U, says(None, tool_calls=[CALL]), RESULT, says("Tell psi.")]},
    "parallel calls": {"tools": TOOLS, "messages": [
        U, says(None, tool_calls=[CALL, call("open_kappa")]), RESULT, {**RESULT, "content": "result tau"},
        says("Tell psi.")]},
    "calls in steps": {"tools": TOOLS, "messages": [
        U, says(None, tool_calls=[{"id": "call_1", **CALL}]), {**RESULT, "tool_call_id": "call_1"},
        says(None, tool_calls=[{"id": "call_2", **call("open_kappa")}]), {**RESULT, "tool_call_id": "call_2"},
        says("Tell psi.")]},
    "thought and call": {"tools": TOOLS, "messages": [
        U, says(None, reasoning_content="Think chi.", tool_calls=[CALL]), RESULT,
        says("Tell psi.", reasoning_content="Think rho.")]},
    "older names": {"functions": [tool["function"] for tool in TOOLS], "messages": [
        U, says(None, function_call=AS_TEXT["function"]),
        {"role": "function", "name": "find_delta", "content": "result sigma"}, says("Tell psi.")]},
    "sharegpt": {"system": "Rule gamma.", "tools": json.dumps([tool["function"] for tool in TOOLS]), "conversations": [
        {"from": "human", "value": "Ask alpha."}, {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "result sigma"}, {"from": "gpt", "value": "Tell psi."}]},
    "names": {"messages": [{**U, "name": "Ada"}, says("Tell omega."), {**U2, "name": "Bob"}, says("Tell psi.")]},
    "turns after a call": {"tools": TOOLS, "messages": [
        S, U, says(None, tool_calls=[CALL]), {"role": "tool", "content": {"value": "sigma"}}, says("Tell omega."), U2,
        says("Tell psi.")]},
}  # fmt: skip
TOLD_OF_PROMPTS = {OTHER_PROMPT, SAID_BY["system"]}  # why a row may not begin as its prompt
NEVER_TRAINED = ("alpha", "beta", "gamma", "sigma", "tau", "Does")


@cache
def tokenizer_of(name: str):
    tokenizer = load_tokenizer(base_model_path("embedded"), None)
    if name not in ORDINARY:
        marks = re.findall(r"<\|?/?\w+\|?>|\[/?[A-Z_]{3,}\]|</?s>|\[gMASK\]", TEMPLATES[name])
        plain = (
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<tool_response>",
            "</tool_response>",
            "<tools>",
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
            "</tools>",
        )
        tokenizer.add_tokens(sorted({mark for mark in marks if mark not in plain}), special_tokens=True)
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        tokenizer.add_special_tokens({"eos_token": EOS[name]})
    found = fit_template(TEMPLATES[name], tokenizer, False, "2025-03-01" if "strftime_now"
                                                       in TEMPLATES[name] else None)  # fmt: skip
    tokenizer.chat_template = found
    return tokenizer


@cache
def encode(name: str, shape: str):
    (made,) = Encoder(tokenizer_of(name), 4096).encode([to_messages(RECORDS[shape], "auto")])
    return made


def trained(name: str, shape: str) -> dict:
    """What a cell of the matrix holds: pieces, and what is missing; or the reason why there are none."""
    made = encode(name, shape)
    if isinstance(made, BadRecord):
        return {"refused": str(made), **({"detail": made.detail} if made.detail else {})}
    (sample,) = made
    pieces = [tokenizer_of(name).decode(sample.input_ids[start:end]) for start, end in sample.spans]
    return {"trained": pieces, **({"missing": list(sample.missing)} if sample.missing else {})}


EXPECTED = json.loads((FOLDER / "trained.json").read_text()) if (FOLDER / "trained.json").exists() else {}


@pytest.mark.parametrize("shape", RECORDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_on_is_exactly_this_or_refused_for_this_reason(name, shape):
    assert trained(name, shape) == EXPECTED[name][shape]


def texts_of(turn: dict) -> list[str]:
    calls = [call["function"] for call in turn.get("tool_calls", [])]
    values = [value for function in calls for value in function["arguments"].values() if isinstance(value, str)]
    thought, _, content = turn["content"].rpartition("</think>")
    inside = thought.replace("<think>", "")
    return [text.strip() for text in (content, inside, turn.get("reasoning_content", ""), *values) if text.strip()] + [
        function["name"] for function in calls
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_that_a_trained_turn_says_is_trained_on_or_named_and_nothing_that_others_say(name):
    for shape, record in RECORDS.items():
        cell = trained(name, shape)
        if "refused" in cell:
            continue
        said = "".join(cell["trained"])
        _, turns = split_tools(to_messages(record, "auto"))
        own = [
            text for turn in turns if turn["role"] == "assistant" and turn.get("weight") != 0 for text in texts_of(turn)
        ]
        lost = [text for text in own if text not in said]
        assert not lost or cell.get("missing"), (shape, lost)
        assert not [word for word in NEVER_TRAINED if word in said], shape
        others = [turn["content"] for turn in turns if turn["role"] in ("user", "system")]
        row = tokenizer_of(name).decode(encode(name, shape)[0].input_ids)
        absent = [text for text in others if text.strip() not in row]
        assert not absent or cell.get("missing"), (shape, absent)
        if "tools" in record and "find_delta" not in row:
            assert "the tools" in cell["missing"], shape


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_generate_sends_begins_the_row_token_by_token(name):
    for shape, record in RECORDS.items():
        made = encode(name, shape)
        if isinstance(made, BadRecord) or not TOLD_OF_PROMPTS.isdisjoint(made[0].missing):
            continue
        messages = to_messages(record, "auto")
        prompt = prompt_ids(tokenizer_of(name), messages[:-1])
        assert made[0].input_ids[: len(prompt)] == prompt, shape
        if "messages" in record:  # a line of generate's input
            assert prompt_ids(tokenizer_of(name), to_question(record)) == prompt
        first_trained = made[0].spans[-1][0]
        assert len(prompt) == first_trained or not made[0].spans[-1][1] - first_trained > 1, shape


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_have_one_text_whether_they_come_as_mapping_or_as_json(name):
    assert trained(name, "call") == trained(name, "call as text")


@pytest.mark.parametrize("name", TAGGED)
def test_labels_are_transformers_own_mask_where_the_template_marks_what_is_generated(name):
    tokenizer = tokenizer_of(name)
    encoder = Encoder(tokenizer, 4096)
    compared = 0
    for shape, record in RECORDS.items():
        messages = to_messages(record, "auto")
        (made,) = encoder.encode([messages])
        if isinstance(made, BadRecord) or any(turn.get("weight") == 0 for turn in messages):
            continue
        normal = encoder.template.renderer.normal(messages)
        dressed, tools = encoder.template.renderer._dress(normal)
        theirs = tokenizer.apply_chat_template(
            dressed, tools=tools, return_assistant_tokens_mask=True, return_dict=True
        )
        if made[0].input_ids != theirs["input_ids"]:  # cut where a prompt ends, for a space follows
            assert tokenizer.decode(made[0].input_ids) == tokenizer.decode(theirs["input_ids"])
            assert any(piece[0].isspace() for piece in trained(name, shape)["trained"])
            continue
        labels = [
            i if mask else IGNORE_INDEX for i, mask in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
        ]
        assert made[0].labels == labels
        compared += 1
    assert compared >= 8


def write() -> None:
    """Write what is trained on now as what is expected."""
    cells = {name: {shape: trained(name, shape) for shape in RECORDS} for name in TEMPLATES}
    (FOLDER / "trained.json").write_text(json.dumps(cells, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
