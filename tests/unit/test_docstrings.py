"""Whatever others may call says in a sentence what it is for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import qlora_ray

PACKAGE = Path(qlora_ray.__file__).parent


def public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, bool]]:
    """Name of each public class, function and method, and whether it has a docstring."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def test_every_module_and_all_that_is_public_in_it_has_a_docstring():
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if "_bundled" in path.parts:
            continue
        tree, name = ast.parse(path.read_text()), str(path.relative_to(PACKAGE))
        assert ast.get_docstring(tree), name
        missing += [f"{name}:{one}" for one, has_one in public(tree.body, "") if not has_one]
    assert missing == []
