"""docs/data.md: its example runs as written, and its lists are those of the code."""

import json
import re

from qlora_ray import show_data as door
from qlora_ray.config import bundled_root
from qlora_ray.data.formats import FORMATS
from qlora_ray.planning.rows import PACKED_MODEL_TYPES

TEXT = (bundled_root() / "docs" / "data.md").read_text()


def test_example_function_turns_its_records_into_rows(tmp_path, monkeypatch, capsys):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "def quiz" in block]
    (tmp_path / "shapes.py").write_text(code)
    record = {"question": "Which is a city?", "choices": ["Nile", "Lima"], "answer": 2}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(record) + "\n")
    (command,) = re.findall(r"^python -m qlora_ray.data (data.train_file=quiz.*)$", TEXT, re.M)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [*command.split(), "data.validation_split=0", f"ray.storage_path={tmp_path}/runs", "--json"]
    assert door.main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    question, answer = row["pieces"]
    assert "Which is a city?\n1. Nile\n2. Lima" in question["text"]
    assert (answer["text"], answer["trained"]) == ("Lima<|end|>", True)


def test_formats_and_packed_families_are_those_of_the_code():
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.M)) == set(FORMATS)
    (listed,) = re.findall(r"test_packing.py`\), for: (.*?), with and without", TEXT, re.S)
    assert set(re.split(r",\s+", listed)) == PACKED_MODEL_TYPES
