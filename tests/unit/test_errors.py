"""What callers may catch."""

import ast
from pathlib import Path

import qlora_ray
from qlora_ray import errors

PACKAGE = Path(qlora_ray.__file__).parent


def test_names_that_are_exported_are_those_of_the_tree():
    assert errors.__all__ == [
        "BadRecord", "BrokenCheckpoint", "ConfigError", "DamagedFile", "GuardError", "ProcessDied", "QloraRayError",
        "Stop", "TooLong", "WorkersFailed",
    ]  # fmt: skip
    assert all(issubclass(getattr(errors, name), errors.QloraRayError) for name in errors.__all__)


def test_no_other_module_has_exceptions_of_its_own():
    names = {*errors.__all__, "Exception", "BaseException", "ValueError", "RuntimeError", "OSError", "TypeError"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and path.name != "errors.py":
                assert not names & {getattr(base, "id", "") for base in node.bases}, f"{path.name}: {node.name}"
