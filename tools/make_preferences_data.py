"""Makes data/preferences_sample.jsonl: what configs/dpo.yaml teaches, an answer in one line preferred to a list.

    python tools/make_preferences_data.py

The base model answers such a request with the list, which is the rejected answer. No two records share a person or a
sentence.
"""

import argparse
import json
from pathlib import Path

import make_sample_data

OUT = Path(__file__).resolve().parent.parent / "data" / "preferences_sample.jsonl"
INSTRUCTION = "Turn the sentence into a list."


def pair(sentence: str, facts: dict[str, str | int]) -> dict[str, str]:
    """A preference record: the same facts in one line, and as the list that was asked for."""
    return {
        "instruction": INSTRUCTION,
        "input": sentence,
        "chosen": ", ".join(f"{key}={value}" for key, value in facts.items()),
        "rejected": "\n".join(f"- {key}: {value}" for key, value in facts.items()),
    }


def records(seed: int, num_records: int) -> list[dict[str, str]]:
    """Pairs of which no two agree in sentence or answers."""
    made = make_sample_data.records(seed, 2 * num_records)
    english = [one for one in made if one["instruction"] == make_sample_data.INSTRUCTION]
    return [pair(one["input"], json.loads(one["output"])) for one in english[:num_records]]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--num-records", type=int, default=600)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in records(arguments.seed, arguments.num_records))
    arguments.out.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
