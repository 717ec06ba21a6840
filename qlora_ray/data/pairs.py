"""Preference records: two conversations with a common beginning, the one that is preferred and the other.

They travel as one: the preferred conversation, and after it a turn {role: rejected, turns: [...]} with all of the
other. Only what follows their common beginning is trained on: assistant turns before it have weight 0. A labelled
record is one conversation, and after it a turn {role: label, is_desirable: ...}.
"""

from typing import Any

from qlora_ray.data import formats
from qlora_ray.data.turns import Messages
from qlora_ray.errors import BadRecord

# Names that people give to the two answers, and what else a preference record may hold beside its format's own fields.
HALVES = {"chosen": ("chosen", "chosen_response"), "rejected": ("rejected", "rejected_response")}
READ_BY_ALL = {name for known in HALVES.values() for name in known} | {"prompt", "question", "system"}
READ_OF_LABELLED = {*formats.LABELS, "completion", "prompt", "question", "system"}
FORMATS_OF_PAIRS = ("alpaca", "messages", "sharegpt", "prompt_completion")


def convert(record: Any, format: str, records: str) -> tuple[Messages, str]:
    """The messages of a record and its format; `records` is answers, pairs or labels (config.TrainingConfig.records).

    Raises BadRecord.
    """
    read = {"answers": formats.convert, "pairs": to_pair, "labels": to_labelled}
    return read[records](record, format)


def unused_fields(record: dict[str, Any], name: str, records: str) -> list[str]:
    """Fields of a record that look like content and that nobody reads."""
    read = {"answers": set(), "pairs": READ_BY_ALL, "labels": READ_OF_LABELLED}[records]
    return formats.unused_fields({key: value for key, value in record.items() if key not in read}, name)


def to_labelled(record: Any, format: str) -> tuple[Messages, str]:
    """The conversation of a labelled record, trained on in its last answer, and its format. Raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord("the record is not a JSON object")
    if format not in (*FORMATS_OF_PAIRS, "auto"):
        record = formats.call(record, format)
        if not isinstance(record, dict):
            raise BadRecord(f"{format} does not return a mapping with a label")
    label = next((record[name] for name in formats.LABELS if name in record), None)
    if not isinstance(label, bool | int) or label not in (0, 1):
        if label is None and any(record.get(name) is not None for known in HALVES.values() for name in known):
            raise BadRecord("a pair of answers: training.objective=kto takes single ones with a label; set dpo")
        why = "is neither true nor false" if label is not None else "is not there"
        raise BadRecord(f"`label` {why}: training.objective=kto asks for answers that are desirable or not")
    answer = record.get("completion")
    if answer is None:
        messages, name = formats.convert(
            {key: value for key, value in record.items() if key not in formats.LABELS}, "auto"
        )
    elif not isinstance(answer, str | list) or not (answer.strip() if isinstance(answer, str) else answer):
        raise BadRecord("`completion` is empty")
    else:
        messages, name = _conversation(record, answer)
    if format in FORMATS_OF_PAIRS and format != name:
        raise BadRecord(f"has the shape of {name}, not of data.format={format}")
    last = max((i for i, turn in enumerate(messages) if turn["role"] in ("user", "prompt")), default=-1)
    turn = {"role": "label", "content": "", "is_desirable": bool(label)}
    return [*_masked(messages, last + 1), turn], name if format in (*FORMATS_OF_PAIRS, "auto") else format


def label_of(messages: Messages) -> bool | None:
    """Whether the answer of a record is desirable; None where it has no label."""
    return messages[-1]["is_desirable"] if messages[-1]["role"] == "label" else None


def to_pair(record: Any, format: str) -> tuple[Messages, str]:
    """The pair of a preference record, and the format that each of its halves has. Raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord("the record is not a JSON object")
    if format not in (*FORMATS_OF_PAIRS, "auto"):
        record = formats.call(record, format)
        if not isinstance(record, dict):
            raise BadRecord(f"{format} does not return a mapping with chosen and rejected")
    chosen, rejected = (_half(record, which) for which in HALVES)
    (first, name), (second, _) = (_conversation(record, half) for half in (chosen, rejected))
    if format in FORMATS_OF_PAIRS and format != name:
        raise BadRecord(f"has the shape of {name}, not of data.format={format}")
    return _joined(first, second), name if format in (*FORMATS_OF_PAIRS, "auto") else format


def halves(messages: Messages) -> list[Messages]:
    """The conversations of a record: of a pair both, the preferred one first."""
    if messages[-1]["role"] == "label":
        return [messages[:-1]]
    if messages[-1]["role"] != "rejected":
        return [messages]
    return [messages[:-1], messages[-1]["turns"]]


def _half(record: dict[str, Any], which: str) -> Any:
    found = next((record[name] for name in HALVES[which] if record.get(name) is not None), None)
    if found is None:
        is_labelled = any(isinstance(record.get(name), bool) for name in formats.LABELS)
        way_out = "; an answer with a label is for kto" if is_labelled else ""
        raise BadRecord(f"no `{which}`: training.objective asks for pairs of answers, chosen and rejected{way_out}")
    if not isinstance(found, str | list | dict):
        raise BadRecord(f"`{which}` is neither a text nor turns")
    if isinstance(found, str | list) and not (found.strip() if isinstance(found, str) else found):
        raise BadRecord(f"`{which}` is empty")
    return found


def _conversation(record: dict[str, Any], half: Any) -> tuple[Messages, str]:
    """What one answer, or one whole conversation, makes of a record, and in which format."""
    before = next((record[f] for f in ("messages", "conversations", "prompt") if isinstance(record.get(f), list)), None)
    beside = {name: record[name] for name in ("tools", "functions", "system") if record.get(name)}
    asked = next((record[f] for f in ("instruction", "question", "prompt") if isinstance(record.get(f), str)), None)
    if isinstance(half, str) and before is None:
        if asked is None:
            raise BadRecord("no `prompt`, `instruction`, `messages` or `conversations`")
        if "instruction" in record or "question" in record or "system" in beside:
            alpaca = {**beside, "instruction": asked, "input": record.get("input"), "output": half}
            return formats.convert(alpaca, "alpaca")
        return formats.convert({"prompt": asked, "completion": half}, "prompt_completion")
    said = half if isinstance(half, list) else [half]
    if isinstance(half, str):
        uses_from = any(isinstance(turn, dict) and "from" in turn for turn in before or ())
        said = [{"from": "gpt", "value": half} if uses_from else {"role": "assistant", "content": half}]
    if before is None:
        before = [] if asked is None or _asks(said) else [{"role": "user", "content": asked}]
    turns = said if said[: len(before)] == before else [*before, *said]
    if any(isinstance(turn, dict) and "from" in turn for turn in turns):
        return formats.convert({**beside, "conversations": turns}, "sharegpt")
    if beside.get("system"):
        turns = [{"role": "system", "content": beside.pop("system")}, *turns]
    return formats.convert({**beside, "messages": turns}, "messages")


def _asks(turns: list[Any]) -> bool:
    """Whether a conversation holds its question itself."""
    return isinstance(turns[0], dict) and turns[0].get("role", turns[0].get("from")) not in ("assistant", "gpt")


def _joined(chosen: Messages, rejected: Messages) -> Messages:
    """The pair, trained on after the common beginning only. Raises BadRecord."""
    if chosen == rejected:
        raise BadRecord("chosen and rejected are the same")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == min(len(chosen), len(rejected)):
        raise BadRecord("one of chosen and rejected is the beginning of the other")
    if not {chosen[same]["role"], rejected[same]["role"]} <= {"assistant", "completion"}:
        raise BadRecord("chosen and rejected have different prompts: they differ before an answer begins")
    return [*_masked(chosen, same), {"role": "rejected", "content": "", "turns": _masked(rejected, same)}]


def _masked(turns: Messages, first: int) -> Messages:
    before = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns[:first]]
    return [*before, *turns[first:]]
