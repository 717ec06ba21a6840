"""python -m qlora_ray.schema: every key of the config with its meaning, as a JSON schema or as docs/config.md."""

import argparse
import json
import sys
from typing import Any

from qlora_ray import door
from qlora_ray.config import Config

HEAD = """\
# Every key of the config

Made from `qlora_ray/config/` by `qlora-ray schema --markdown > docs/config.md`. A key stands in the YAML file under
its section, or on the command line as `section.key=value`, which wins. Unknown keys are refused.
"""
RULES = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
NAMES = {"number": "number", "integer": "integer", "string": "text", "boolean": "true or false", "null": "null"}


def main(argv: list[str] | None = None) -> int:
    """Print the schema; returns the exit code."""
    parser = door.make_parser("schema", "Print every key of the config with its type, default and meaning.")
    parser.add_argument("--markdown", action="store_true", help="as a page, docs/config.md, not as a JSON schema")
    return door.run(parser, _print, argv)


def as_markdown() -> str:
    """docs/config.md: a table for each section, and for each mapping that its keys take."""
    schema = Config.model_json_schema()
    parts = [HEAD]
    waiting = [(name, _models(prop)[0]) for name, prop in schema["properties"].items()]
    while waiting:
        path, model = waiting.pop(0)
        section = schema["$defs"][model]
        parts.append(f"## {path}\n\n{_sentence(section)}\n\n{_table(section)}\n")
        inner = [(f"{path}.{key}", one) for key, prop in section["properties"].items() for one in _models(prop)]
        once = {one: (place, one) for place, one in reversed(inner)}
        waiting = [*reversed(once.values()), *waiting]
    return "\n".join(parts)


def _print(arguments: argparse.Namespace) -> int:
    print(as_markdown() if arguments.markdown else json.dumps(Config.model_json_schema(), indent=1) + "\n", end="")
    return 0


def _table(section: dict[str, Any]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, prop in section["properties"].items():
        default = "required" if key in section.get("required", []) else _default(prop)
        lines.append(f"| `{key}` | {_type(prop)} | {default} | {_sentence(prop)} |")
    return "\n".join(lines)


def _models(prop: Any) -> list[str]:
    """The mappings with keys of their own that a value may be, or hold."""
    if isinstance(prop, list):
        return list(dict.fromkeys(model for one in prop for model in _models(one)))
    if not isinstance(prop, dict):
        return []
    named = [prop["$ref"].rsplit("/", 1)[-1]] if "$ref" in prop else []
    return named + _models([value for name, value in prop.items() if name != "default"])


def _type(prop: dict[str, Any]) -> str:
    if kinds := prop.get("anyOf") or prop.get("oneOf"):
        return ", or ".join(dict.fromkeys(_type(kind) for kind in kinds))
    if "$ref" in prop:
        return "mapping as below"
    if "enum" in prop or "const" in prop:
        return ", ".join(f"`{value}`" for value in prop.get("enum") or [prop["const"]])
    if "prefixItems" in prop:
        return f"[{', '.join(_type(kind) for kind in prop['prefixItems'])}]"
    if prop.get("type") == "array":
        return f"list of {_type(prop['items'])}" if prop["items"] else "list"
    if prop.get("type") == "object":
        return f"mapping of keys to {_type(prop['additionalProperties'])}"
    rules = [f"{rule} {prop[name]:,}" for name, rule in RULES.items() if name in prop]
    return ", ".join([NAMES[prop["type"]], *rules])


def _default(prop: dict[str, Any]) -> str:
    empty: Any = {"array": [], "object": {}}.get(prop.get("type", ""))  # what a factory makes is not in the schema
    default = prop.get("default", empty)
    return "as below" if _models(prop) and isinstance(default, dict) else f"`{json.dumps(default)}`"


def _sentence(prop: dict[str, Any]) -> str:
    return " ".join(prop.get("description", "").split()).replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
