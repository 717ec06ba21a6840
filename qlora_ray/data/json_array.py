"""Parses a JSON array item by item from text that comes in blocks."""

import json
from collections.abc import Iterator
from typing import Any

from qlora_ray.errors import DamagedFile


def array_items(blocks: Iterator[str]) -> Iterator[Any]:
    """The items of a JSON array, parsed as the text comes. Raises DamagedFile with line and column."""
    decode = json.JSONDecoder().raw_decode
    text, position, place = "", 0, _Place()
    expected = "["  # or "item", or ","
    while True:
        position = _skip_space(text, position)
        problem, where = "the array does not end", len(text)
        if position < len(text):
            character = text[position]
            if character == "]" and expected in ("item", ","):
                if text[position + 1 :].strip() or any(block.strip() for block in blocks):
                    raise DamagedFile("there is more after the end of the array")
                return
            if expected == "item":
                try:
                    item, end = decode(text, position)
                    end = _skip_space(text, end)
                    is_number = isinstance(item, int | float)  # 12 may be the start of 12.5
                    if end < len(text) and (not is_number or text[end] in ",]"):
                        yield item
                        position, expected = end, ","
                        continue
                except json.JSONDecodeError as error:
                    problem, where = error.msg, error.pos
                    if where < len(text) - 16 and not problem.startswith("Unterminated"):  # not for want of text
                        raise DamagedFile(place.of(text, where, problem)) from None
                except RecursionError:
                    raise DamagedFile("the JSON is nested too deeply") from None
            elif character == expected:
                position, expected = position + 1, "item"
                continue
            else:
                raise DamagedFile(place.of(text, position, f"expected {expected!r}"))
        block = next(blocks, "")
        if not block:
            raise DamagedFile(place.of(text, where, problem))
        place.pass_over(text, position)
        text, position = text[position:] + block, 0


class _Place:
    """Line and column of positions in a text of which the front is thrown away as it is read."""

    def __init__(self) -> None:
        self._lines, self._columns = 0, 0  # before the text that is left

    def pass_over(self, text: str, position: int) -> None:
        newlines = text.count("\n", 0, position)
        self._columns = position - text.rfind("\n", 0, position) - 1 if newlines else self._columns + position
        self._lines += newlines

    def of(self, text: str, position: int, problem: str) -> str:
        newlines = text.count("\n", 0, position)
        column = position - text.rfind("\n", 0, position) if newlines else self._columns + position + 1
        return f"not JSON at line {self._lines + newlines + 1}, column {column}: {problem}"


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
