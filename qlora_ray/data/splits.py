"""Which files a split means, and which of their records a slice takes: as the `datasets` library has it."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import yaml

from qlora_ray.config import DataSource
from qlora_ray.data.files import DataFile
from qlora_ray.data.read import count
from qlora_ray.errors import ConfigError, DamagedFile

# The words of datasets/data_files.py (5.2): a folder or a file is of the split that its name holds as a whole word.
KEYWORDS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
SEPARATOR = "[-._ 0-9]"
SHARD = r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*"

Splits = dict[str, list[DataFile]]


def splits_by_name(names: Iterable[str]) -> dict[str, list[str]]:
    """Paths below a folder by the split that they name; {} where none names any.

    What shards in data/ say goes before the names of folders, and those before the names of files.
    """
    names = list(names)
    shards: dict[str, list[str]] = {}
    for name in names:
        if found := re.fullmatch(SHARD, name):
            shards.setdefault(found[1], []).append(name)
    return shards or _with_word(names, rf"(^|/|{SEPARATOR})(%s)(/|{SEPARATOR}[^/]*/)") or _with_word(
        names, rf"(^|/|{SEPARATOR})(%s){SEPARATOR}[^/]*$"
    )  # fmt: skip


def _with_word(names: list[str], pattern: str) -> dict[str, list[str]]:
    found = {split: [name for name in names if re.search(pattern % words, name)] for split, words in KEYWORDS.items()}
    return {split: some for split, some in found.items() if some}


def splits_by_card(card: str, names: list[str], entry: DataSource, where: str) -> dict[str, list[str]] | None:
    """Paths by split as the `configs` of a data set's README.md list them; None where it lists none.

    Raises ConfigError where it lists several and `entry` names none of them.
    """
    configs = _configs(card)
    if not configs:
        return None
    default = [n for n, one in configs.items() if len(configs) == 1 or n == "default" or one.get("default")]
    chosen = entry.name or (default[0] if default else None)
    if chosen not in configs:
        raise ConfigError(f"{where}: has no configuration {chosen!r}. Set name to one of: {', '.join(configs)}.")
    config = configs[chosen]
    below = str(config.get("data_dir") or "").strip("./")
    files = config.get("data_files")
    if files is None:
        inside = [name for name in names if not below or name.startswith(f"{below}/")]
        return splits_by_name(inside) or {"": inside}
    files = files if isinstance(files, list) else [files]
    listed: dict[str, list[str]] = {}
    for one in files:
        split, paths = (one.get("split"), one.get("path")) if isinstance(one, dict) else ("train", one)
        patterns = [_regex(f"{below}/{path}" if below else str(path)) for path in _as_list(paths)]
        matching = [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
        if matching:
            listed.setdefault(str(split), []).extend(matching)
    if not listed:
        raise ConfigError(f"{where}: its README.md lists files of {chosen}, and none is here. Download it again.")
    return listed


def _configs(card: str) -> dict[str, dict[str, Any]]:
    front = re.match(r"---\n(.*?)\n---", card, re.S)
    try:
        known = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return {}  # `datasets` takes such a card for one without
    listed = known.get("configs") if isinstance(known, dict) else None
    some = [one for one in _as_list(listed) if isinstance(one, dict) and "config_name" in one]
    return {str(one["config_name"]): one for one in some}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _regex(pattern: str) -> str:
    """A glob as the hub means it: ** crosses folders, * and ? do not."""
    parts = re.split(r"(\*\*/?|\*|\?)", pattern.removeprefix("./"))
    meaning = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(meaning.get(part) or re.escape(part) for part in parts)


def choose(splits: Splits, spec: str, where: str) -> list[DataFile]:
    """The files that `spec` names: a split, slices of it, sums of those, as load_dataset(split=...) takes them.

    Raises ConfigError for a split that is not there, or a slice that takes nothing.
    """
    named = re.findall(r"(?:^|\+)\s*([\w.-]+)", spec)
    for name in named:
        if name not in splits:
            raise ConfigError(f"{where}: has no split {name!r}. Set data.split to one of: {', '.join(sorted(splits))}.")
    if named == [spec]:
        return splits[spec]
    import datasets

    try:
        whole = {name: [_counted(file, where) for file in splits[name]] for name in named}
        instruction = datasets.ReadInstruction.from_spec(spec)
        slices = instruction.to_absolute({name: sum(n for _, n in files) for name, files in whole.items()})
    except ValueError as error:
        raise ConfigError(f"{where}: data.split={spec}: {str(error).splitlines()[0]}.") from error
    taken = [file for one in slices for file in _slice(whole[one.splitname], one.from_, one.to)]
    if not taken:
        raise ConfigError(f"{where}: data.split={spec}: takes none of {sum(n for _, n in whole[named[0]])} records.")
    return taken


def _counted(file: DataFile, where: str) -> tuple[DataFile, int]:
    try:
        return file, count(file)
    except DamagedFile as error:
        raise ConfigError(f"{where}: {file.name}: {error}.") from error


def _slice(files: list[tuple[DataFile, int]], start: int, stop: int) -> list[DataFile]:
    """Files with the records of theirs that lie in [start, stop) of all."""
    taken, before = [], 0
    for file, number in files:
        first, last = max(start - before, 0), min(stop - before, number)
        if first < last:
            taken.append(file if (first, last) == (0, number) else replace(file, taken=(first, last)))
        before += number
    return taken
