"""Records: where they lie, what form they have, what of them is trained on."""

import datetime
import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from qlora_ray.config.section import Section


class DataSource(Section):
    """One of several sources of records, with its own settings."""

    path: str = Field(min_length=1)
    """A file, glob, folder, URI or hub data set id."""
    weight: float = Field(1.0, gt=0)
    """How often each record appears in an epoch: 2.0 twice, 0.5 a seeded half of them once."""
    split: str | None = None
    """Split or slice of this entry, as in data.split; default: data.split, for validation "validation"."""
    name: str | None = None
    """Configuration of a hub data set (load_dataset's `name`), or of a folder whose README.md lists some."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; default: data.revision."""


def _shape_of(value: Any) -> str:
    return "list" if isinstance(value, list) else "mapping" if isinstance(value, dict | DataSource) else "str"


_Path = Annotated[str, Field(min_length=1), Tag("str")]
_Mapping = Annotated[DataSource, Tag("mapping")]
_Entry = Annotated[_Path | _Mapping, Discriminator(_shape_of)]
# Told apart by shape, so that a mistake in one entry is told once, and of that entry.
DataFiles = Annotated[_Path | _Mapping | Annotated[list[_Entry], Tag("list")], Discriminator(_shape_of)]


class DataConfig(Section):
    """Records, and what of them is trained on: [data.md](data.md)."""

    train_file: DataFiles = "data/sample_data.json"
    """Path, glob, folder, URI or hub data set id; or a list of those or of {path, weight}. See docs/data.md."""
    validation_file: DataFiles | None = None
    """Validation records, named as above; without it validation_split of the training records are held out."""
    validation_split: float = Field(0.1, ge=0, lt=1)
    """Share of the training records held out for validation; 0 turns validation off."""
    format: str = "auto"
    """auto, alpaca, messages, sharegpt, prompt_completion, text, or package.module:function (record to messages)."""
    chat_template: str | None = None
    """Default: the tokenizer's own, else plain. Or plain, chatml, or a file with a Jinja template."""
    train_on: Literal[
        "all_assistant_turns", "last_turn", "last_exchange", "tool_calls", "last_tool_call", "everything"
    ] = "all_assistant_turns"
    """What the loss is taken over: all that the assistant says (thoughts and calls are part of it), the last turn, all
    turns after the last question, turns that call a tool, the last of those; or prompts too."""
    keep_thoughts: Literal["template", "all"] = "template"
    """Thoughts of earlier answers that the template leaves out: as it does, or all, one more sample for each."""
    date: str | None = None
    """Day that a chat template which prints the day prints, YYYY-MM-DD; default: the first day in this storage_path."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    split: str = "train"
    """Split to train on, of a hub data set or of a folder with splits; also a slice: train[:10%], train[100:200]."""
    order: Literal["shuffled", "given", "by_length"] = "shuffled"
    """shuffled: anew each epoch. given: as the files have it. by_length: the longest first. See docs/data.md."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop if more than this share of the records is unusable."""

    @field_validator("train_file", "validation_file")
    @classmethod
    def _names_something(cls, value):
        if value == []:
            raise ValueError("must name at least one file")
        return value

    @field_validator("date", mode="before")
    @classmethod
    def _date_is_a_day(cls, date):
        try:
            return date and datetime.date.fromisoformat(str(date)).isoformat()  # YAML reads a day as a date
        except ValueError:
            raise ValueError("must be a day, YYYY-MM-DD") from None

    @field_validator("format")
    @classmethod
    def _format_is_known_or_a_function(cls, name):
        known = ("auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text")
        if name not in known and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
            raise ValueError(f"must be one of {', '.join(known)}, or package.module:function")
        return name

    def sources(self, key: str) -> list[DataSource]:
        """Entries of train_file or validation_file, in order; empty where there are none."""
        value = getattr(self, key)
        entries = [] if value is None else value if isinstance(value, list) else [value]
        return [entry if isinstance(entry, DataSource) else DataSource(path=entry) for entry in entries]
