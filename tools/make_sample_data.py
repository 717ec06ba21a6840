"""Makes data/sample_data.json: the skill that the quickstart teaches, a sentence about a person into JSON.

    python tools/make_sample_data.py

The base model was never shown it (see tools/corpus.py). No two records share a person or a sentence, so any random
split holds out records that are new to the adapter.
"""

import argparse
import json
from pathlib import Path
from random import Random

import pools
from people import article

OUT = Path(__file__).resolve().parent.parent / "data" / "sample_data.json"
CHINESE_SHARE = 0.2

INSTRUCTION = "Turn the sentence into JSON."
FORMS = (
    "{name} lives in {city}, is {age} years old and works as {a_job}.",
    "{name} is {a_job} from {city}, aged {age}.",
    "{name} is {age} years old, comes from {city} and works as {a_job}.",
    "{name}, {age}, is {a_job} and lives in {city}.",
    "Meet {name}, who works as {a_job}, lives in {city} and is {age} years old.",
    "The {job} {name} is {age} years old and lives in {city}.",
    "{name} from {city} is {age} years old and works as {a_job}.",
    "{name} ({age}) works as {a_job} and comes from {city}.",
)
ZH_INSTRUCTION = "把这句话变成 JSON。"
ZH_FORMS = (
    "{name}住在{city}，今年{age}岁，是一名{job}。",
    "{name}今年{age}岁，来自{city}，是一名{job}。",
    "{name}是一名{job}，住在{city}，今年{age}岁。",
    "来自{city}的{name}今年{age}岁，是一名{job}。",
)


def record(rng: Random) -> dict[str, str]:
    """One record in the alpaca form; the keys of the answer are English in both languages, in a fixed order."""
    is_chinese = rng.random() < CHINESE_SHARE
    person = {
        "name": pools.zh_name(rng) if is_chinese else rng.choice(pools.NAMES),
        "age": rng.randrange(18, 90),
        "city": rng.choice(pools.ZH_CITIES if is_chinese else pools.CITIES),
        "job": rng.choice(pools.ZH_JOBS if is_chinese else pools.JOBS),
    }
    sentence = rng.choice(ZH_FORMS if is_chinese else FORMS).format(**person, a_job=article(person["job"]))
    instruction = ZH_INSTRUCTION if is_chinese else INSTRUCTION
    return {"instruction": instruction, "input": sentence, "output": json.dumps(person, ensure_ascii=False)}


def records(seed: int, num_records: int) -> list[dict[str, str]]:
    """Records of which no two agree in input or output."""
    rng, made, seen = Random(seed), [], set()
    while len(made) < num_records:
        new = record(rng)
        if seen.isdisjoint({new["input"], new["output"]}):
            seen |= {new["input"], new["output"]}
            made.append(new)
    return made


def main() -> None:
    """Writes the file, a record a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--num-records", type=int, default=1600)
    args = parser.parse_args()
    lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in records(args.seed, args.num_records))
    args.out.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
