"""Invented people and the sentences about them, in English and Chinese. Pure: every choice comes from the given rng."""

from dataclasses import dataclass
from random import Random

import pools


@dataclass(frozen=True)
class Field:
    """One thing that can be said about a person; `{v}` is the value, `{a}` the value with its article, `{n}` a name."""

    key: str
    zh_key: str
    values: list[str]
    zh_values: list[str]
    clauses: tuple[str, ...]
    questions: tuple[str, ...]
    zh_clauses: tuple[str, ...]
    zh_questions: tuple[str, ...]


AGES = [str(age) for age in range(5, 100)]
HOUSES = [str(house) for house in range(1, 400)]

FIELDS = (
    Field("age", "年龄", AGES, AGES, ("is {v} years old", "is aged {v}", "turned {v} this year"),
          ("How old is {n}?", "What is the age of {n}?"), ("今年{v}岁", "{v}岁"), ("{n}多大？", "{n}几岁？")),
    Field("city", "城市", pools.CITIES, pools.ZH_CITIES,
          ("lives in {v}", "comes from {v}", "has a home in {v}", "is from {v}"),
          ("Where does {n} live?", "Which city is {n} from?"),
          ("住在{v}", "来自{v}"), ("{n}住在哪里？", "{n}在哪个城市？")),
    Field("job", "职业", pools.JOBS, pools.ZH_JOBS,
          ("works as {a}", "is {a}", "earns a living as {a}", "has a job as {a}"),
          ("What is the job of {n}?", "What does {n} work as?"),
          ("是一名{v}", "当{v}", "的工作是{v}"), ("{n}做什么工作？",)),
    Field("pet", "宠物", pools.PETS, pools.ZH_PETS, ("has {a}", "keeps {a}", "feeds {a}"),
          ("Which pet does {n} have?",), ("养了{v}", "有一只{v}"), ("{n}养了什么？",)),
    Field("colour", "颜色", pools.COLOURS, pools.ZH_COLOURS, ("likes {v} best", "paints the house {v}"),
          ("What colour does {n} like?",), ("喜欢{v}色",), ("{n}喜欢什么颜色？",)),
    Field("food", "食物", pools.FOODS, pools.ZH_FOODS, ("eats {v}", "likes to eat {v}", "cooks {v}"),
          ("What does {n} eat?",), ("爱吃{v}", "常吃{v}"), ("{n}爱吃什么？",)),
    Field("hobby", "爱好", pools.HOBBIES, pools.ZH_HOBBIES, ("enjoys {v}", "loves {v}", "is good at {v}"),
          ("What does {n} enjoy?", "What is the hobby of {n}?"), ("爱好是{v}", "喜欢{v}"), ("{n}的爱好是什么？",)),
    Field("drink", "饮料", pools.DRINKS, pools.ZH_DRINKS, ("drinks {v}", "orders {v}"),
          ("What does {n} drink?",), ("爱喝{v}", "常喝{v}"), ("{n}爱喝什么？",)),
    Field("house", "门牌", HOUSES, HOUSES, ("lives at number {v}", "has house number {v}"),
          ("What is the house number of {n}?",), ("住{v}号", "门牌是{v}号"), ("{n}的门牌是多少？",)),
    Field("friend", "朋友", pools.NAMES, [], ("is a friend of {v}", "knows {v}", "often meets {v}"),
          ("Who is the friend of {n}?",), ("认识{v}", "的朋友是{v}"), ("{n}认识谁？",)),
)  # fmt: skip
BY_KEY = {field.key: field for field in FIELDS}
NUMERIC = {"age", "house"}
INVENTED = 0.35  # the share of invented values: enough that looking a value up in memory never beats copying it


@dataclass(frozen=True)
class Person:
    """A name and an ordered choice of facts, with the language they are told in."""

    name: str
    facts: dict[str, str]
    is_chinese: bool

    def label(self, key: str, chinese: bool | None = None) -> str:
        """The key in the language of the answer."""
        chinese = self.is_chinese if chinese is None else chinese
        if key == "name":
            return "姓名" if chinese else "name"
        return BY_KEY[key].zh_key if chinese else key

    def value(self, key: str) -> str:
        """The value of a fact, the name included."""
        return self.name if key == "name" else self.facts[key]


def name(rng: Random, is_chinese: bool) -> str:
    """A first name from the pool, or an invented one."""
    if is_chinese:
        return pools.zh_name(rng)
    return pools.invented_name(rng) if rng.random() < INVENTED else rng.choice(pools.NAMES)


def _value(rng: Random, field: Field, is_chinese: bool) -> str:
    if field.key == "friend":
        return name(rng, is_chinese)
    if field.key not in NUMERIC and rng.random() < INVENTED:
        if is_chinese:
            return pools.zh_invented_word(rng)
        return pools.invented_name(rng) if field.key == "city" else pools.invented_word(rng)
    return rng.choice(field.zh_values if is_chinese else field.values)


def person(rng: Random, is_chinese: bool) -> Person:
    """Somebody with one to five facts in random order; the commonest fields are drawn more often."""
    fields = rng.sample(FIELDS[:3], rng.randrange(4)) + rng.sample(FIELDS[3:], rng.choice((0, 1, 1, 2)))
    fields = fields or [rng.choice(FIELDS)]
    rng.shuffle(fields)
    return Person(name(rng, is_chinese), {f.key: _value(rng, f, is_chinese) for f in fields}, is_chinese)


def article(value: str) -> str:
    """The value behind "a" or "an"."""
    return f"{'an' if value[0] in 'aeiou' else 'a'} {value}"


def join(parts: list[str]) -> str:
    """Parts as an English list: "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def clause(rng: Random, key: str, value: str, is_chinese: bool) -> str:
    """One fact as a predicate without its subject."""
    field = BY_KEY[key]
    return rng.choice(field.zh_clauses if is_chinese else field.clauses).format(v=value, a=article(value))


def sentence(rng: Random, who: Person) -> str:
    """All facts of a person as prose, in one of many forms; facts come in any order."""
    keys = list(who.facts)
    rng.shuffle(keys)
    return _zh_sentence(rng, who, keys) if who.is_chinese else _en_sentence(rng, who, keys)


def _en_sentence(rng: Random, who: Person, keys: list[str]) -> str:
    n, form = who.name, rng.randrange(9)
    if form < 4 and len(keys) > 1:
        subject, first = n, keys[0]
        if form == 0 and "age" in keys:
            keys = _without(keys, "age")
            subject = rng.choice((f"{n} ({who.facts['age']})", f"{n}, {who.facts['age']},"))
        elif form == 1 and "city" in keys:
            keys = _without(keys, "city")
            subject = f"{n} {rng.choice(('from', 'of'))} {who.facts['city']}"
        elif form == 2 and "job" in keys:
            keys, job = _without(keys, "job"), who.facts["job"]
            subject = rng.choice((f"The {job} {n}", f"{n} the {job}", f"{n}, {article(job)},"))
        elif form == 3:
            return f"{n}, who {clause(rng, first, who.facts[first], False)}, {_predicate(rng, who, keys[1:])}."
        return f"{subject} {_predicate(rng, who, keys)}."
    if form == 4:
        return rng.choice(("Meet", "This is", "Here is")) + f" {n}, who {_predicate(rng, who, keys)}."
    if form == 5:
        pronoun = rng.choice(("She", "He"))
        parts = [clause(rng, key, who.facts[key], False) for key in keys]
        return f"{n} {parts[0]}." + "".join(f" {pronoun} {part}." for part in parts[1:])
    if form == 6:
        return rng.choice(("My neighbour", "Our friend", "The person called", "A person named")) + (
            f" {n} {_predicate(rng, who, keys)}.")  # fmt: skip
    return f"{n} {_predicate(rng, who, keys)}."


def _zh_sentence(rng: Random, who: Person, keys: list[str]) -> str:
    subject = who.name
    if len(keys) > 1 and rng.random() < 0.4:
        key = keys[0]
        subject = f"{clause(rng, key, who.facts[key], True).removeprefix('的')}的{who.name}"
        keys = keys[1:]
    parts = [clause(rng, key, who.facts[key], True) for key in keys]
    return subject + "，".join([parts[0]] + ["他" * p.startswith("的") + p for p in parts[1:]]) + "。"


def _predicate(rng: Random, who: Person, keys: list[str]) -> str:
    return join([clause(rng, key, who.facts[key], False) for key in keys])


def _without(keys: list[str], key: str) -> list[str]:
    return [k for k in keys if k != key]
