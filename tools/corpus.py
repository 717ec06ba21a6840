"""The synthetic corpus: prose and chat over invented facts, in English and Chinese. Pure: seeded, byte-identical.

A task is a function from an rng to the messages of one chat, the last of which is the assistant's. The tasks teach
copying from the context, slot extraction as "key: value" and JSON from other material. None turns a sentence about a
person into JSON, and no JSON holds the keys name, age, city or job: that skill is left for the adapter to learn
(data/sample_data.json).
"""

import json
from collections.abc import Callable
from random import Random

import people
import pools

Message = dict[str, str]
CHINESE_SHARE = 0.25


def chat(*turns: str, system: str | None = None) -> list[Message]:
    """Alternating user and assistant turns as messages."""
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _about(rng: Random, instruction: str, text: str) -> str:
    """An instruction and its material, most often in this order."""
    return f"{instruction}\n\n{text}" if rng.random() < 0.8 else f"{text}\n\n{instruction}"


def _is_chinese(rng: Random) -> bool:
    return rng.random() < CHINESE_SHARE


def _item(rng: Random, is_chinese: bool) -> str:
    if is_chinese:
        return rng.choice(pools.ZH_WORDS) if rng.random() < 0.5 else pools.zh_invented_word(rng)
    maker = rng.randrange(6)
    if maker < 2:
        return pools.invented_word(rng)
    if maker == 2:
        return pools.number(rng)
    if maker == 3:
        return rng.choice(pools.NAMES + pools.CITIES)
    return rng.choice(pools.WORDS)


def ask(rng: Random) -> list[Message]:
    """One to three questions about a sentence, each answered by the value alone."""
    who = people.person(rng, _is_chinese(rng))
    keys = rng.sample(list(who.facts), min(len(who.facts), rng.choice((1, 1, 2, 3))))
    turns = []
    for key in keys:
        field = people.BY_KEY[key]
        if rng.random() < 0.3:
            question = f"{field.zh_key}是什么？" if who.is_chinese else f"What is the {key}?"
        else:
            question = rng.choice(field.zh_questions if who.is_chinese else field.questions).format(n=who.name)
        turns += [question, who.facts[key]]
    turns[0] = _about(rng, turns[0], people.sentence(rng, who))
    return chat(*turns)


def ask_name(rng: Random) -> list[Message]:
    """Who the sentence is about."""
    who = people.person(rng, _is_chinese(rng))
    question = rng.choice(("这是谁？", "说的是谁？") if who.is_chinese else ("Who is this?", "What is the name?"))
    return chat(_about(rng, question, people.sentence(rng, who)), who.name)


def list_facts(rng: Random) -> list[Message]:
    """All facts of a sentence, or those asked for in their order, as key-value lines in one of three notations."""
    who = people.person(rng, _is_chinese(rng))
    keys = ["name", *who.facts]
    in_chinese = who.is_chinese and rng.random() < 0.6
    notation = rng.randrange(3)
    if rng.random() < 0.6:
        rng.shuffle(keys)
        keys = keys[: rng.randint(1, len(keys))]
        wanted = ("，" if in_chinese else ", ").join(who.label(key, in_chinese) for key in keys)
        openings = ("列出：", "写出：", "用等号列出：") if in_chinese else ("List: ", "Facts: ", "With =: ")
        instruction = openings[notation] + wanted
    elif in_chinese:
        instruction = ("列出事实。", "把这句话变成清单。", "用等号列出事实。")[notation]
    else:
        instruction = ("List the facts.", "Turn the sentence into a list.", "Write the facts with =.")[notation]
    if notation == 2:
        answer = ", ".join(f"{who.label(key, in_chinese)}={who.value(key)}" for key in keys)
    else:
        answer = "\n".join("- " * notation + f"{who.label(key, in_chinese)}: {who.value(key)}" for key in keys)
    return chat(_about(rng, instruction, people.sentence(rng, who)), answer)


def reword(rng: Random) -> list[Message]:
    """The same facts in another sentence."""
    who = people.person(rng, _is_chinese(rng))
    instructions = "Say it in other words.", "Turn the sentence around."
    instruction = rng.choice(("换个说法。", "把这句话改写一下。") if who.is_chinese else instructions)
    return chat(_about(rng, instruction, people.sentence(rng, who)), people.sentence(rng, who))


def tell(rng: Random) -> list[Message]:
    """Key-value lines become a sentence."""
    who = people.person(rng, _is_chinese(rng))
    lines = "\n".join(f"{who.label(key)}: {who.value(key)}" for key in ("name", *who.facts))
    instruction = "把这些写成一句话。" if who.is_chinese else "Turn the facts into a sentence."
    return chat(_about(rng, instruction, lines), people.sentence(rng, who))


def yes_or_no(rng: Random) -> list[Message]:
    """Whether a statement agrees with a sentence."""
    who = people.person(rng, _is_chinese(rng))
    key = rng.choice(list(who.facts))
    is_true = rng.random() < 0.5
    field = people.BY_KEY[key]
    values = (field.zh_values if who.is_chinese else field.values) or pools.ZH_GIVEN
    value = who.facts[key] if is_true else rng.choice(values)
    is_true = value == who.facts[key]
    if who.is_chinese:
        turns = _about(rng, f"{field.zh_key}是{value}吗？", people.sentence(rng, who)), "是" if is_true else "不是"
    else:
        turns = _about(rng, f"Is the {key} {value}?", people.sentence(rng, who)), "Yes" if is_true else "No"
    return chat(*turns)


def copy(rng: Random) -> list[Message]:
    """A text repeated as it is."""
    is_chinese = _is_chinese(rng)
    if rng.random() < 0.5:
        text = people.sentence(rng, people.person(rng, is_chinese))
    else:
        text = ("" if is_chinese else " ").join(_item(rng, is_chinese) for _ in range(rng.randint(2, 12)))
    instruction = rng.choice(("重复一遍。", "照抄。") if is_chinese else ("Repeat.", "Copy the text.", "Say it again."))
    return chat(_about(rng, instruction, text), text)


def upper(rng: Random) -> list[Message]:
    """Words in capital letters."""
    pick = (pools.invented_word, lambda rng: rng.choice(pools.WORDS), lambda rng: rng.choice(pools.WORDS))
    words = [rng.choice(pick)(rng) for _ in range(rng.randint(1, 4))]
    instruction = rng.choice(("Write in capital letters.", "Turn the words into capitals."))
    return chat(_about(rng, instruction, " ".join(words)), " ".join(words).upper())


LIST_TASKS: dict[str, tuple[str, Callable[[list[str]], list[str]]]] = {
    "Reverse the list.": ("把列表倒过来。", lambda items: items[::-1]),
    "Give the first item.": ("给出第一项。", lambda items: items[:1]),
    "Give the last item.": ("给出最后一项。", lambda items: items[-1:]),
    "Give the second item.": ("给出第二项。", lambda items: items[1:2]),
    "Drop the first item.": ("去掉第一项。", lambda items: items[1:]),
    "Copy the list.": ("照抄列表。", lambda items: items),
    "Count the items.": ("数一数有几项。", lambda items: [str(len(items))]),
}


def on_list(rng: Random) -> list[Message]:
    """One or two operations on a list of two to six items."""
    is_chinese = _is_chinese(rng)
    items = [_item(rng, is_chinese) for _ in range(rng.randint(2, 6))]
    comma = "、" if is_chinese else ", "
    turns = []
    for instruction in rng.sample(list(LIST_TASKS), rng.choice((1, 1, 2))):
        zh_instruction, operation = LIST_TASKS[instruction]
        turns += [zh_instruction if is_chinese else instruction, comma.join(operation(items))]
    turns[0] = _about(rng, turns[0], comma.join(items))
    return chat(*turns)


def _json_object(rng: Random) -> dict[str, str | int]:
    is_chinese = rng.random() < 0.15
    record: dict[str, str | int] = {}
    for _ in range(rng.randint(1, 5)):
        key = rng.choice(pools.JSON_KEYS) if rng.random() < 0.6 else pools.invented_word(rng)
        value = pools.number(rng) if rng.random() < 0.25 else _item(rng, is_chinese)
        if key != "name" and key not in people.BY_KEY:
            record[key] = int(value) if value.isdigit() else value
    return record or {"size": 1}


def to_json(value: object) -> str:
    """JSON as this corpus writes it: one line, characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def write_json(rng: Random) -> list[Message]:
    """Key-value lines or a list become JSON."""
    if rng.random() < 0.2:
        items = [_item(rng, False) for _ in range(rng.randint(1, 5))]
        return chat(_about(rng, "Turn the list into JSON.", ", ".join(items)), to_json(items))
    record = _json_object(rng)
    notation = rng.randrange(3)
    if notation == 2:
        text = ", ".join(f"{k}={v}" for k, v in record.items())
    else:
        text = "\n".join("- " * notation + f"{k}: {v}" for k, v in record.items())
    instruction = rng.choice(("Turn the lines into JSON.", "Write it as JSON.", "Make JSON.", "写成 JSON。"))
    return chat(_about(rng, instruction, text), to_json(record))


def pick_json(rng: Random) -> list[Message]:
    """The keys asked for, out of key-value lines, as JSON in the order asked for."""
    record = _json_object(rng)
    keys = list(record)
    rng.shuffle(keys)
    keys = keys[: rng.randint(1, len(keys))]
    text = "\n".join(f"{k}: {v}" for k, v in record.items())
    return chat(_about(rng, f"JSON with: {', '.join(keys)}", text), to_json({k: record[k] for k in keys}))


def read_json(rng: Random) -> list[Message]:
    """A value, the keys, or all lines of a JSON object."""
    record = _json_object(rng)
    key = rng.choice(list(record))
    form = rng.randrange(3)
    if form == 0:
        turns = "List the JSON.", "\n".join(f"{k}: {v}" for k, v in record.items())
    elif form == 1:
        turns = "Which keys?", ", ".join(record)
    else:
        turns = rng.choice((f"What is the {key}?", f"{key}?")), str(record[key])
    return chat(_about(rng, turns[0], to_json(record)), turns[1])


SMALL_TALK = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Who are you?", "I am a very small language model."),
    ("Thank you.", "You are welcome."),
    ("你好！", "你好！我能帮你做什么？"),
    ("你是谁？", "我是一个很小的语言模型。"),
    ("谢谢。", "不客气。"),
)
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "你是一个有用的助手。")


def small_talk(rng: Random) -> list[Message]:
    """A greeting."""
    return chat(*rng.choice(SMALL_TALK))


def prose(rng: Random) -> str:
    """Text without chat: a few people, each told about once or twice."""
    is_chinese = _is_chinese(rng)
    told = [people.sentence(rng, who) for who in (people.person(rng, is_chinese) for _ in range(2)) for _ in range(2)]
    return ("" if is_chinese else " ").join(told[: rng.randint(2, 4)])


TASKS: dict[Callable[[Random], list[Message] | str], int] = {
    ask: 12, ask_name: 4, list_facts: 26, reword: 8, tell: 5, yes_or_no: 5, copy: 8, upper: 2, on_list: 9,
    write_json: 12, pick_json: 5, read_json: 6, small_talk: 1, prose: 3,
}  # fmt: skip


def document(rng: Random) -> list[Message] | str:
    """One document of the corpus: the messages of a chat, or prose."""
    made = rng.choices(list(TASKS), list(TASKS.values()))[0](rng)
    if isinstance(made, list) and rng.random() < 0.05:
        made = [{"role": "system", "content": rng.choice(SYSTEM)}, *made]
    return made


def render(document: list[Message] | str) -> str:
    """A document as text with its special tokens; for a chat, exactly what the chat template writes."""
    if isinstance(document, str):
        return f"<|bos|>{document}<|end|>"
    return "<|bos|>" + "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in document)
