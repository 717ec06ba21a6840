"""What the pages say is there is there: files, commands, keys, and which tests are slow."""

import ast
import re
from pathlib import Path

import pytest

from qlora_ray import schema

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("clusters/*.md"), *ROOT.glob("benchmarks/*.md")]
)
OTHERS = [ROOT / name for name in (".rayignore", "Makefile", "pyproject.toml", "clusters/Dockerfile")]
# Of a run or sweep, and of what a user has.
NOT_OURS = re.compile(r"(rejected|metrics|trials|samples_by_step|in|out)\.jsonl|(my|t0003|train_config|config)\.yaml|"
                      r"(plan|manifest|summary|samples|results|verification|qlora_ray|prompts|stats|config)\.json|shapes\.py|"
                      r"convert_hf_to_gguf\.py|(deepspeed/|runs/|adapter/).*")  # fmt: skip


def named_files(text: str) -> set[str]:
    """What stands in backticks or is linked, and looks like a file of the checkout."""
    words = [word for quoted in re.findall(r"`([^`\n]+)`", text) for word in quoted.split()]
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    paths = {
        word for word in [*words, *links] if re.fullmatch(r"[\w.-]+(/[\w.-]+)*\.(py|md|yaml|yml|json|sh|txt|png)", word)
    }
    return {path for path in paths if not NOT_OURS.fullmatch(path)} | {link for link in links if link}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page):
    text = page.read_text()
    named = named_files(text) | set(
        re.findall(r"\b(?:tests|docs|configs|benchmarks|tools|clusters)/[\w/.]*\w\.\w+", text)
    )
    places = (ROOT, ROOT / "qlora_ray", page.parent)
    assert sorted(name for name in named if not any((place / name).exists() for place in places)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_shown_exists(page):
    text = page.read_text()
    modules = set(re.findall(r"python -m ((?:qlora_ray|benchmarks|tools|tests)[\w.]*\w)", text))
    modules = {{"qlora_ray.data": "qlora_ray.show_data"}.get(name, name) for name in modules}
    files = {name: ROOT / name.replace(".", "/") for name in modules}
    missing = [
        name
        for name, path in files.items()
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists())
    ]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert missing == [] and set(re.findall(r"(?m)(?:^|`)make ([a-z][\w-]+)(?=`| *#| *$)", text)) <= targets


def all_are_slow(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    marks = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        if ast.unparse(node.targets[0]) == "pytestmark"
    ]
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return all(any("mark.slow" in mark for mark in [*marks, *map(ast.unparse, test.decorator_list)]) for test in tests)


def test_table_of_faults_says_which_tests_are_slow():
    named = re.findall(r"`(tests/[\w/]+\.py)`( \(slow\))?", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 20
    assert [name for name, slow in named if all_are_slow(ROOT / name) and not slow] == []
    assert [name for name, slow in named if slow and "mark.slow" not in (ROOT / name).read_text()] == []


def test_page_of_all_keys_is_made_from_the_schema(capsys):
    assert schema.main(["--markdown"]) == 0
    made = capsys.readouterr().out
    assert made == (ROOT / "docs" / "config.md").read_text(), "qlora-ray schema --markdown > docs/config.md"


def test_page_of_all_keys_says_of_each_its_type_and_meaning():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", schema.as_markdown(), re.M)
    assert len(rows) > 80 and all(type_ and default and meaning for _, type_, default, meaning in rows)
