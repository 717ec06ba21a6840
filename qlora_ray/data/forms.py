"""The form in which a chat template wants what a conversation holds, found by rendering, not by a list of models.

A template may want a call's arguments as a mapping or as JSON text, a caller's empty content null, empty or left out,
tools wrapped, bare or as text in the system turn, ids of nine letters, thoughts in a field or in the content. A probe
renders small conversations in each form, and takes the first in which everything shows.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_ray.data.turns import Messages, split_tools
from qlora_ray.errors import BadRecord

# What a template may trip over: its own refusal, or a form that it cannot handle.
RENDER_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
THOUGHT_IN_CONTENT = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)
SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")

TOOL_NAME = "Zf999fZ"
TOOL = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Says Zd0dZ.",
        "parameters": {
            "type": "object",
            "properties": {"Zk0kZ": {"type": "string", "description": "Zp0pZ"}},
            "required": ["Zk0kZ"],
        },
    },
}


@dataclass(frozen=True)
class Forms:
    """What a template wants; None is what it has no place for."""

    tools: str | None = "wrapped"  # wrapped, bare: as `tools`; system: as JSON text in the system turn
    arguments: str | None = "mapping"  # or text
    no_content: str = "null"  # or empty, absent: of a turn that only calls
    result_role: str = "tool"
    ids: str = "given"  # or shown: always there, for the template prints them; short: of nine letters or digits, too
    thought: str | None = "field"  # or content: before the answer, in <think> tags


class Renderer:
    """A tokenizer's chat template, given conversations in the form that it wants."""

    def __init__(self, tokenizer):
        self.template, self._special_tokens = tokenizer.chat_template, tokenizer.special_tokens_map
        self.has_generation_tags = "endgeneration" in self.template
        self.forms = Forms()
        self.forms = _probe(self)

    def render(self, conversation: Messages, *, for_generation: bool = False) -> str:
        """The template's text; with for_generation it ends where the assistant begins to speak. Raises BadRecord."""
        return self._render([conversation], for_generation)[0]

    def render_all(self, conversations: list[Messages]) -> list[str | BadRecord]:
        """Text of each conversation, or why there is none."""
        texts: dict[int, str | BadRecord] = {}
        plain = [i for i, turns in enumerate(conversations) if turns[0]["role"] != "tools"]
        with contextlib.suppress(BadRecord):  # one of them: each alone will tell
            texts |= zip(plain, self._render([conversations[i] for i in plain], False), strict=True)
        for i in range(len(conversations)):
            if i not in texts:
                try:
                    texts[i] = self.render(conversations[i])
                except BadRecord as reason:
                    texts[i] = reason
        return [texts[i] for i in range(len(conversations))]

    def generation_spans(self, conversation: Messages) -> list[tuple[int, int]]:
        """Characters between the template's own {% generation %} tags."""
        return self._call([conversation], return_assistant_tokens_mask=True)[1][0]

    def normal(self, conversation: Messages) -> Messages:
        """The conversation with what it leaves open filled in: thoughts apart, ids, names of results."""
        return [self._thought_apart(turn) for turn in _with_ids(conversation, self.forms.ids)]

    def _render(self, conversations: list[Messages], for_generation: bool) -> list[str]:
        return self._call(conversations, add_generation_prompt=for_generation)[0] if conversations else []

    def _call(self, conversations: list[Messages], **options) -> Any:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        dressed = [self._dress(conversation) for conversation in conversations]
        tools: Any = dressed[0][1]
        try:
            return render_jinja_template(
                conversations=[turns for turns, _ in dressed], tools=tools, chat_template=self.template,
                **options, **self._special_tokens,
            )  # fmt: skip
        except (TemplateError, *RENDER_ERRORS) as error:
            said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise BadRecord("the chat template refuses it", said) from error

    def _thought_apart(self, turn: dict[str, Any]) -> dict[str, Any]:
        """The turn with a thought that stands in its content in a field of its own, if the template reads one."""
        if turn["role"] != "assistant" or self.forms.thought != "field" or "</think>" not in turn["content"]:
            return turn
        thought, answer = split_thought(turn["content"])
        if not thought.strip() or turn.get("reasoning_content") or not (answer or turn.get("tool_calls")):
            return turn
        return {**turn, "content": answer, "reasoning_content": thought}

    def _dress(self, conversation: Messages) -> tuple[Messages, list[dict[str, Any]] | None]:
        """Turns and tools as the template takes them."""
        tools, turns = split_tools(conversation)
        dressed = [turn if len(turn) == 2 and turn["role"] != "tool" else self._dress_turn(turn) for turn in turns]
        if tools and self.forms.tools == "bare":
            tools = [tool.get("function", tool) for tool in tools]
        if tools and self.forms.tools == "system":
            has_system = dressed[0]["role"] == "system"
            system = dressed[0] if has_system else {"role": "system", "content": ""}
            system = {**system, "tools": json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)}
            return [system, *dressed[has_system:]], None
        return dressed, tools

    def _dress_turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        forms, made = self.forms, {key: value for key, value in turn.items() if key != "weight"}
        if turn["role"] == "tool":
            made["role"] = forms.result_role
        thought = made.get("reasoning_content")
        if thought and forms.thought == "field":
            made["thinking"] = made["reasoning"] = thought
        elif thought:
            del made["reasoning_content"]
            if forms.thought == "content":
                made["content"] = f"<think>\n{thought.strip()}\n</think>\n\n{made['content']}"
        if "tool_calls" in made:
            made["tool_calls"] = [self._dress_call(call) for call in made["tool_calls"]]
            if not made["content"] and forms.no_content == "absent":
                del made["content"]
            elif not made["content"] and forms.no_content == "null":
                made["content"] = None
        return made

    def _dress_call(self, call: dict[str, Any]) -> dict[str, Any]:
        if self.forms.arguments != "text":
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json_text(function["arguments"])}}


def split_thought(content: str) -> tuple[str, str]:
    """The thought that stands before an answer in <think> tags, and the answer; without such the thought is empty."""
    found = THOUGHT_IN_CONTENT.fullmatch(content)
    return (found[1].strip("\n"), found[2]) if found else ("", content)


def json_text(value: Any) -> str:
    """As templates write JSON: tojson's defaults, nothing escaped but what must be."""
    return json.dumps(value, ensure_ascii=False)


def _with_ids(conversation: Messages, form: str) -> Messages:
    """Calls with ids where the template wants them, and results with the id and name of the call that they answer."""
    if not any(len(turn) > 2 or turn["role"] == "tool" for turn in conversation):
        return conversation
    made: Messages = []
    calls: list[tuple[str | None, str | None, str]] = []  # id as given and as it is now, name
    number = 0
    for turn in conversation:
        if turn.get("tool_calls"):
            given = [call.get("id") for call in turn["tool_calls"]]
            if form != "given":
                turn = {**turn, "tool_calls": [
                    {**call, "id": _id(call.get("id"), number + i, form)} for i, call in enumerate(turn["tool_calls"])
                ]}  # fmt: skip
            number += len(given)
            calls = [
                (known, call.get("id"), call["function"]["name"])
                for known, call in zip(given, turn["tool_calls"], strict=True)
            ]
        elif turn["role"] == "tool":
            turn = _answered(turn, calls)
        made.append(turn)
    return made


def _answered(turn: dict[str, Any], calls: list[tuple[str | None, str | None, str]]) -> dict[str, Any]:
    """A result with id and name of the call that it answers: by its id, else the first that has no result yet."""
    asked = turn.get("tool_call_id")
    place = next((i for i, call in enumerate(calls) if asked and call[0] == asked), 0)
    if not calls:
        return turn
    _, number, name = calls.pop(place)
    return {"name": name, **turn} | ({"tool_call_id": number} if number else {})


def _id(known: str | None, number: int, form: str) -> str:
    if form == "shown":
        return known or f"call_{number}"
    if known:
        return known if SHORT_ID.fullmatch(known) else hashlib.sha256(known.encode()).hexdigest()[:9]
    return f"{number:09d}"


def _probe(renderer: Renderer) -> Forms:
    forms = renderer.forms
    for probe in (_probe_thought, _probe_calls, _probe_tools):
        forms = renderer.forms = probe(renderer, forms)
    return forms


def _try(renderer: Renderer, forms: Forms, conversation: Messages) -> str:
    """The text in a form; "" where the template refuses it."""
    renderer.forms = forms
    try:
        return renderer.render(_with_ids(conversation, forms.ids))
    except BadRecord:
        return ""


USER = {"role": "user", "content": "Zq0qZ"}
ANSWER = {"role": "assistant", "content": "Zq1qZ"}


def _probe_thought(renderer: Renderer, forms: Forms) -> Forms:
    thinking = [USER, {**ANSWER, "reasoning_content": "Zt1tZ"}]
    for form in ("field", "content"):
        if form == "field" or "</think>" in renderer.template:
            tried = replace(forms, thought=form)
            if "Zt1tZ" in _try(renderer, tried, thinking):
                return tried
    return replace(forms, thought=None)


def _probe_calls(renderer: Renderer, forms: Forms) -> Forms:
    """The form in which call and result show, the shortest of those that differ in a caller's empty content alone."""
    for needs_result in (True, False):
        found: dict[str, tuple[int, Forms]] = {}
        for tried in _call_forms(forms):
            texts = [_try(renderer, tried, conversation) for conversation in _calling(needs_result)]
            if all(_shows_call(renderer, text) and (not needs_result or "Zr0rZ" in text) for text in texts):
                key = f"{tried.arguments} {tried.ids} {tried.result_role}"
                size = sum(map(len, texts))
                if tried.ids == "given" and "Zi0iZ" in texts[0]:
                    tried = replace(tried, ids="shown")
                if key not in found or size < found[key][0]:
                    found[key] = size, tried
        if found:
            return next(iter(found.values()))[1]
    return replace(forms, arguments=None, no_content="empty")


def _call_forms(forms: Forms) -> Iterator[Forms]:
    kinds = itertools.product(
        ("tool", "ipython", "observation", "function"), ("given", "short"), ("mapping", "text"),
        ("null", "empty", "absent"),
    )  # fmt: skip
    for result_role, ids, arguments, no_content in kinds:
        yield replace(forms, arguments=arguments, ids=ids, result_role=result_role, no_content=no_content)


def _calling(with_result: bool) -> list[Messages]:
    """Conversations with a call, its id given or not, alone and, if asked, with its result and an answer to that."""
    made = []
    for known in ({"id": "call_Zi0iZ"}, {}):
        call = {**known, "type": "function", "function": {"name": "Zf0fZ", "arguments": {"Za0aZ": "Zv0vZ"}}}
        asked: Messages = [{"role": "tools", "content": "", "tools": [TOOL]}, USER]
        calls = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
        of_call = {"tool_call_id": "call_Zi0iZ"} if known else {}
        result = {"role": "tool", "content": "Zr0rZ", **of_call}
        made.append([*calls, result, ANSWER] if with_result else calls)
    return made


def _shows_call(renderer: Renderer, text: str) -> bool:
    """Whether name and arguments show as they are: not as a JSON text in JSON, nor as Python writes mappings."""
    shown = all(part in text for part in ("Zf0fZ", "Za0aZ", "Zv0vZ"))
    is_plain = '\\"Za0aZ' not in text and "'Za0aZ'" not in text
    return shown and is_plain and ("None" not in text or "None" in renderer.template)


def _probe_tools(renderer: Renderer, forms: Forms) -> Forms:
    """The form in which most of a tool shows; its name must."""
    tools = {"role": "tools", "content": "", "tools": [TOOL]}
    best, most = replace(forms, tools=None), 0
    for form in ("wrapped", "bare", "system"):
        tried = replace(forms, tools=form)
        for opening in ([{"role": "system", "content": "Zs0sZ"}], []):
            text = _try(renderer, tried, [tools, *opening, USER, ANSWER])
            num_shown = sum(part in text for part in ("Zd0dZ", "Zk0kZ", "Zp0pZ", f'"{TOOL_NAME}"')) + 1
            if TOOL_NAME in text and f"'{TOOL_NAME}'" not in text and num_shown > most:
                best, most = tried, num_shown
    return best
