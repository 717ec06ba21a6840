"""Whatever others may call says in a sentence what it is for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import qlora_ray

PACKAGE = Path(qlora_ray.__file__).parent
STILL_WITHOUT = {
    "inference/load.py:pick_device",
    "inference/verify.py:Drift.as_dict",
    "model/facts.py:weight_files",
    "model/head.py:returns_nats",
    "model/layer.py:FusedLayer.normalize_input",
    "model/projection.py:Member.rank",
    "model/projection.py:Member.scale",
    "model/projection.py:Member.a",
    "model/projection.py:Member.b",
    "model/projection.py:member",
    "model/projection.py:Single.parameters",
    "model/projection.py:LoraProjection.forward",
    "model/projection.py:LoraProjection.backward",
    "model/record.py:Adapter.quantization",
    "model/record.py:Adapter.compute_dtype",
    "model/record.py:Adapter.context_length",
    "worker/engine.py:Engine.module",
    "worker/engine.py:Engine.forward",
    "worker/engine.py:Engine.train",
    "worker/messages.py:Logged.step",
    "worker/setup.py:num_rows",
    "worker/watchdog.py:stacks_file",
}


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
    assert sorted(set(missing) - STILL_WITHOUT) == []
