"""Makes data/tools_sample.jsonl: the skill that configs/tools.yaml teaches, to call the right tool with what was said.

    python tools/make_tools_data.py

Each record offers two or three tools and asks for what one of them does. No two make the same request, so any random
split holds out requests that are new to the adapter. Tools, parameters and requests are worded in tokens that the
embedded base knows (python -m qlora_ray.data --check tells): it has never read a "_", for one.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pools

OUT = Path(__file__).resolve().parent.parent / "data" / "tools_sample.jsonl"


@dataclass(frozen=True)
class Tool:
    """A function that may be called; {0} and {1} in its requests are the values of its parameters."""

    name: str
    does: str
    parameters: dict[str, Callable[[Random], str | int]]  # by name, where its values come from
    requests: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        """The tool as OpenAI's `tools` field holds it."""
        kinds = {
            name: "integer" if isinstance(draw(Random(0)), int) else "string" for name, draw in self.parameters.items()
        }
        properties = {name: {"type": kind} for name, kind in kinds.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": self.name, "description": self.does, "parameters": parameters}}


def one_of(values: list[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(values)


CITY, NAME, ITEM = one_of(pools.CITIES), one_of(pools.NAMES), one_of(pools.THINGS)
TOOLS = (
    Tool("weather", "The weather of a city.", {"city": CITY},
         ("What is the weather in {0}?", "How is the weather in {0}?", "Does it rain in {0}?")),
    Tool("clock", "The time of a city.", {"city": CITY}, ("What time is it in {0}?", "How late is it in {0}?")),
    Tool("timer", "A timer.", {"minutes": lambda rng: rng.randrange(2, 100)},
         ("Set a timer of {0} minutes.", "Start a timer of {0} minutes.")),
    Tool("phone", "To phone a person.", {"person": NAME}, ("Phone {0}.", "Let me phone {0}.")),
    Tool("buy", "To buy an item.", {"item": ITEM, "count": lambda rng: rng.randrange(2, 60)},
         ("Buy this item: {0}, {1} times.", "Buy {1} times: {0}.")),
    Tool("table", "A table in a city.", {"name": NAME, "city": CITY},
         ("A table in {1} for {0}.", "I want a table in {1} for {0}.")),
    Tool("work", "To find work in a city.", {"job": one_of(pools.JOBS), "city": CITY},
         ("Find work in {1} as {0}.", "I am a {0}. Find me work in {1}.")),
    Tool("paint", "To paint an item.", {"item": ITEM, "colour": one_of(pools.COLOURS)},
         ("Paint the {0} {1}.", "Make the {0} {1}.")),
    Tool("ticket", "A ticket from a city to a city.", {"from": CITY, "to": CITY},
         ("A ticket from {0} to {1}.", "I want to go from {0} to {1}.")),
    Tool("cook", "To cook food, with a drink.", {"food": one_of(pools.FOODS), "drink": one_of(pools.DRINKS)},
         ("Cook {0}, with {1}.", "I want to eat {0} and drink {1}.")),
)  # fmt: skip


def record(rng: Random) -> dict[str, Any]:
    """One record: tools, a request, and the call that answers it."""
    offered = rng.sample(TOOLS, rng.choice((2, 3)))
    wanted = rng.choice(offered)
    values = {name: draw(rng) for name, draw in wanted.parameters.items()}
    request = rng.choice(wanted.requests).format(*values.values())
    call = {"id": "call_1", "type": "function", "function": {"name": wanted.name, "arguments": values}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": request}, answer], "tools": [tool.schema() for tool in offered]}


def records(seed: int, num_records: int) -> list[dict[str, Any]]:
    """Records of which no two make the same request."""
    rng, made, seen = Random(seed), [], set()
    while len(made) < num_records:
        new = record(rng)
        request = new["messages"][0]["content"]
        if request not in seen:
            seen.add(request)
            made.append(new)
    return made


def main() -> None:
    """Writes the file, a record a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--num-records", type=int, default=1100)
    args = parser.parse_args()
    lines = "".join(json.dumps(one) + "\n" for one in records(args.seed, args.num_records))
    args.out.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
