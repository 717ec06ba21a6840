"""Every patch of a library's internals, and every use of what it promises nobody: python -m benchmarks.patches.

`pytest -m bites` says whether each still has its effect; those that need a GPU are skipped elsewhere.
"""

import importlib
from pathlib import Path

import qlora_ray
from qlora_ray.libraries import TESTED, Patch

PACKAGE = Path(qlora_ray.__file__).parent


def collect() -> dict[str, Patch]:
    """Every Patch of the package, by module and name, in the order of the libraries."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "Patch(" in path.read_text("utf-8"):
            name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            module = importlib.import_module(f"qlora_ray.{name}")
            found |= {f"{name}.{key}": one for key, one in vars(module).items() if isinstance(one, Patch)}
    return dict(sorted(found.items(), key=lambda item: list(TESTED).index(item[1].library)))


def main() -> None:
    print("| patch | library, as read in | what | gains | delete it when |\n|---|---|---|---|---|")
    for name, one in collect().items():
        print(f"| {name} | {one.library} {one.read_in} | {one.what} | {one.gains} | {one.delete_when} |")


if __name__ == "__main__":
    main()
