"""Writes into each file of configs/recipes what the plan forecasts for it: python -m tools.recipes

A recipe names its command in a comment; the base is rebuilt from its config.json alone (tests/recipes), as an empty
folder of the right names and shapes. tests/unit/test_recipes.py holds the comments to be what the plan says.
"""

import contextlib
import io
import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
ROW = re.compile(r" *(\d+) +\d+\.\d\d ")  # of the plan's table: rows a forward pass, peak GiB
COMMAND = re.compile(r"^# python -m qlora_ray\.plan (.*)$", re.M)
BEGIN, END = "# Forecast:\n", "# End of the forecast.\n"


def main() -> None:
    """Rewrite all comments."""
    for path in RECIPES:
        text = path.read_text()
        before, _, rest = text.partition(BEGIN)
        path.write_text(before + BEGIN + forecast(path) + END + rest.partition(END)[2])
        print(path.relative_to(ROOT))


def forecast(recipe: Path) -> str:
    """What the recipe's command prints for the rows that it trains with, as lines of a comment."""
    from qlora_ray import plan
    from qlora_ray.config import load_config

    config = load_config(recipe)
    arguments = shlex.split(COMMAND.search(recipe.read_text())[1])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        write_base(ROOT / "tests" / "recipes" / f"{recipe.stem}.json", Path(folder))
        assert plan.main([*arguments, "--host-gib", "1000", f"model.base_model={folder}"]) == 0
    lines = said.getvalue().splitlines()
    first, *others = (line for line in lines if not line.startswith("longest row"))
    sizes = [ROW.match(line) for line in others]
    rows = [
        line for line, row in zip(others, sizes, strict=True) if not row or int(row[1]) == config.training.batch_size
    ]
    return "".join(f"#   {line}\n" for line in [first.partition(": ")[2], *rows])


def write_base(config_json: Path, folder: Path) -> None:
    """A folder that a plan takes for the published base: its config, and a header of all names and shapes."""
    (folder / "config.json").write_text(config_json.read_text())
    (folder / "tokenizer.json").write_text("{}")
    header, offset = {}, 0
    for name, shape in published_shapes(folder):
        size = 2
        for number in shape:
            size *= number
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + offset)  # without taking room on the disk


def published_shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of each weight as the hub has them: experts one by one, which transformers stacks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = {"lm_head.weight"} if model.config.get_text_config().tie_word_embeddings else set()
    for name, weight in model.named_parameters():
        if name in tied:
            continue
        stem, dot, last = name.rpartition(".")
        if not stem.endswith(".experts"):
            yield name, list(weight.shape)
        for number in range(len(weight) if stem.endswith(".experts") else 0):
            parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[last]
            for part in parts:
                yield f"{stem}.{number}.{part}.weight", [weight.shape[1] // len(parts), weight.shape[2]]


if __name__ == "__main__":
    main()
