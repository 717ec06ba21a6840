"""Imports point one way, and what must answer at once imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_ray

PACKAGE = Path(qlora_ray.__file__).parent
HEAVY = ("torch", "ray", "transformers", "deepspeed", "peft", "bitsandbytes", "datasets", "numpy", "pyarrow")

# Who may import whom, at the top of a module or inside a function: each line names only lines above it. Doors lie on
# the last floor, and nobody imports them; cli opens them by name.
MAY_IMPORT = {
    "errors": set(),  # which all others may import
    "libraries": set(),
    "laps": set(),
    "collector": set(),
    "environment": {"libraries"},
    "console": set(),
    "config": {"environment"},
    "storage": {"environment", "config"},
    "door": {"console", "config", "storage"},
    "model": {"libraries", "config"},
    "data": {"config", "storage"},
    "planning": {"environment", "config", "data", "model"},
    "rundir": {"config", "storage", "data", "model", "planning"},
    "cluster": {"libraries", "environment", "config", "storage", "data", "model", "planning"},
    "worker": {"libraries", "laps", "collector", "config", "storage", "data", "model", "planning", "rundir"},
    "report": {"config", "storage", "door", "rundir"},
    "driver": {"libraries", "laps", "collector", "console", "config", "storage", "data", "model", "planning", "rundir",
               "cluster", "worker", "report"},
    "inference": {"config", "storage", "data", "model", "cluster", "worker"},
    "sweep": {"libraries", "environment", "console", "config", "storage", "data", "model", "planning", "rundir",
              "cluster", "report"},
}  # fmt: skip
DOORS = {
    "init": {"config", "console", "door", "data", "model", "planning", "cluster"},
    "train": {"config", "door", "driver"},
    "tune": {"door", "sweep"},
    "generate": {"config", "console", "door", "model", "inference"},
    "evaluate": {"config", "console", "door", "model", "inference"},
    "export": {"config", "console", "door", "model", "inference"},
    "doctor": {"config", "console", "door", "storage", "planning", "cluster"},
    "plan": {"door", "planning"},
    "show_data": {"config", "console", "door", "storage", "data", "model", "planning", "cluster"},
    "schema": {"config", "door"},
    "cli": set(),
    "data.__main__": {"show_data"},  # python -m qlora_ray.data runs this file: the one import that goes back up
    "report.__main__": {"report"},
}


def part_of(path: Path) -> str:
    if path.name == "__main__.py":  # a door that lies in a package
        return f"{path.parent.name}.__main__"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names inside the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("qlora_ray.") for name in found if name.startswith("qlora_ray.")}


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_bundled" not in path.parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_the_table_allows(path):
    part = part_of(path)
    if part == "__init__":
        assert imports(path) == set()
        return
    allowed = {**MAY_IMPORT, **DOORS}
    assert part in allowed, f"{part} is new: add it to the table"
    above = {name.split(".")[0] for name in imports(path)} - {part, "__version__"}
    assert above <= allowed[part] | {"errors"}


def test_table_has_no_circle_and_no_door_is_imported():
    floors = list(MAY_IMPORT)
    for part, allowed in MAY_IMPORT.items():
        assert all(floors.index(name) < floors.index(part) for name in allowed)
    assert all(allowed <= MAY_IMPORT.keys() for part, allowed in DOORS.items() if part != "data.__main__")


def modules_of(path: Path) -> set[Path]:
    """Modules of the package that a module imports, anywhere in it."""
    found = set()
    for name in imports(path):
        whole = PACKAGE / name.replace(".", "/")
        files = [place for one in (whole, whole.parent) for place in (one.with_suffix(".py"), one / "__init__.py")]
        found |= set([file for file in files if file.is_file()][:1])
    return found - {path}


def test_no_two_modules_import_each_other_by_whatever_way():
    left = {path: modules_of(path) for path in MODULES}
    while free := [path for path, needed in left.items() if not needed & left.keys()]:
        for path in free:
            del left[path]
    assert not left, [str(path.relative_to(PACKAGE)) for path in left]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_cli_imports_by_a_name_that_this_test_cannot_see(path):
    text = path.read_text()
    if path.name != "cli.py":
        assert "runpy" not in text
        assert "import_module(f" not in text and 'import_module("qlora_ray' not in text


def test_only_the_engine_and_its_patches_import_deepspeed():
    users = {
        str(path.relative_to(PACKAGE).parent if path.parent.name == "deepspeed_patches" else path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.split(".")[0] == "deepspeed"
    }
    assert users == {"worker/engine.py", "worker/deepspeed_patches"}


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "libraries",
        "console",
        "door",
        "planning.plan",
        "planning.table",
        "plan",
        "show_data",
        "schema",
        "cli",
        "init",
        "train",
        "tune",
        "data.stats",
        "model.facts",
        "model.record",
        "generate",
        "evaluate",
        "export",
    ],
)
def test_what_must_answer_at_once_loads_nothing_heavy(module):
    code = f"import sys, qlora_ray.{module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
