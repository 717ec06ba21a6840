"""Imports point one way, and what must answer at once imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_ray

PACKAGE = Path(qlora_ray.__file__).parent
HEAVY = ("torch", "ray", "transformers", "deepspeed", "peft", "bitsandbytes", "datasets", "numpy", "pyarrow")

# Who may import whom, at the top of a module or inside a function: each line only names above it, or its own.
MAY_IMPORT = {
    "environment": set(),
    "config": {"environment"},
    "authentication": {"config"},
    "storage": {"config", "environment"},
    "checkpoints": {"config", "storage"},
    "data": {"config", "storage"},
    "model": {"config"},
    "trackers": {"config"},
    "forecast": {"config", "model"},
    "deepspeed_settings": {"config"},
    "plan": {"config", "data", "model", "forecast", "deepspeed_settings"},
    "cluster": {"config", "environment", "authentication", "plan"},
    "fit": {"config", "model", "forecast", "plan"},
    "screen": {"config", "data", "model", "plan"},
    "report": {"config", "storage"},
    "worker": {"config", "storage", "checkpoints", "data", "model", "plan"},
    "failures": {"worker"},
    "elastic": set(),
    "checks": {"environment", "config", "authentication", "storage", "data", "model", "forecast", "plan", "cluster"},
    "driver": {"config", "cluster", "storage", "checkpoints", "data", "model", "plan", "screen", "report", "worker",
               "failures", "elastic", "trackers"},
    "train": {"config", "storage", "checkpoints", "data", "model", "plan", "cluster", "checks", "screen", "driver",
              "trackers"},
    "sweep": {"config", "environment", "storage", "checkpoints", "data", "model", "forecast", "plan", "cluster",
              "screen", "report", "trackers", "train"},
    "tune": {"config", "storage", "train", "sweep"},
    "use": {"config", "storage", "data", "model", "worker", "cluster"},
    "generate": {"config", "model", "use"},
    "evaluate": {"config", "model", "use", "generate"},
    "export": {"config", "model", "use", "generate"},
    "report.__main__": {"report"},
    "doctor": {"config", "storage", "cluster", "checks", "screen", "train"},
    "data.__main__": {"config", "storage", "data", "model", "plan", "cluster", "train"},
    "cli": {"config"},  # the doors it opens by name
}  # fmt: skip


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
    assert part in MAY_IMPORT, f"{part} is new: add it to the table"
    above = {name.split(".")[0] for name in imports(path)} - {part, "__version__"}
    assert above <= MAY_IMPORT[part]


def test_table_has_no_circle():
    order = list(MAY_IMPORT)
    for part, allowed in MAY_IMPORT.items():
        assert all(order.index(name) < order.index(part) for name in allowed)


def test_only_the_engine_imports_deepspeed():
    users = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.split(".")[0] == "deepspeed"
    }
    assert users == {"worker/engine.py"}


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "plan",
        "fit",
        "cli",
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
