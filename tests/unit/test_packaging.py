"""What the package asks for is what it imports, and it says that it has types."""

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import qlora_ray

providers = functools.cache(packages_distributions)  # of all that is installed: it takes a second
PACKAGE = Path(qlora_ray.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
EXTRAS = ("tensorboard", "mlflow", "wandb", "optuna", "lm-eval", "check")
WITH_TORCH = {"triton"}  # its builds for GPUs bring it; CPU builds do without
IMPORTED_AS = {"lm_eval": "lm-eval", "mlflow": "mlflow-skinny"}  # where the extra need not be installed


def declared(*extras: str) -> set[str]:
    asked = [*PROJECT["dependencies"], *(one for extra in extras for one in PROJECT["optional-dependencies"][extra])]
    return {plain(re.match(r"[\w.-]+", one)[0]) for one in asked}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Top names of everything that a module of the package imports, anywhere in it."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return names - {"qlora_ray"} - WITH_TORCH - set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", sorted(imported()))
def test_every_library_that_is_imported_is_declared(name):
    provided_by = {plain(one) for one in providers().get(name, [])} | {plain(IMPORTED_AS.get(name, name))}
    assert provided_by & declared(*EXTRAS)


def test_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").read_bytes() == b""
