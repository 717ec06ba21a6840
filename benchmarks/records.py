"""Data files of random words, to be trained on."""

import json
import random
from pathlib import Path


def save_rows(folder: str, length: int, count: int = 200) -> Path:
    """Records that each fill `length` tokens and more, a random word being several: `count`, of long rows fewer."""
    words, count = [f"{random.Random(n).randrange(36**5):x}" for n in range(500)], min(count, max(8, 2**21 // length))
    path = Path(folder, f"rows_{length}_{count}.jsonl")
    with path.open("w") as file:
        for row in range(count):
            text = " ".join(random.Random(row).choices(words, k=length // 4))
            file.write(json.dumps({"instruction": "Go on.", "input": "", "output": text}) + "\n")
    return path


def save_chats(folder: str) -> Path:
    """2,000 chats of log-normal lengths, whose answers are a third of their text."""
    words, path = [f"{random.Random(n).randrange(36**5):x}" for n in range(500)], Path(folder, "chats.jsonl")
    with path.open("w") as file:
        for row in range(2000):
            pick = random.Random(row)
            turns = []
            for _ in range(pick.randint(1, 3)):
                length = max(3, int(pick.lognormvariate(3.0, 0.8)))
                for role, factor in (("user", 2), ("assistant", 1)):
                    turns.append({"role": role, "content": " ".join(pick.choices(words, k=factor * length))})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path
