"""What is worth knowing of all records before they are trained on: copies, leaks, and each one's own faults.

Reads records as training does and changes nothing, neither them nor the cache.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlora_ray.config import Config
from qlora_ray.data.faults import Base, can_tell_mojibake, faults_of, text_of
from qlora_ray.data.near import Groups, NearGroups, can_be_near, normalised
from qlora_ray.data.order import held_out
from qlora_ray.data.pairs import convert, halves
from qlora_ray.data.read import BLANK, cut, place_unit, read
from qlora_ray.data.sources import Source
from qlora_ray.data.turns import Messages
from qlora_ray.errors import BadRecord, DamagedFile

RECORDS_AT_ONCE = 512
RECORDS_A_LINE = 20_000  # of what tells how far it is
MOST_EXAMPLES = 3
MOST_TEXTS = 20_000  # of records that are like an earlier one, kept for examples
SHOWN_CHARACTERS = 160
INSTALL = 'is not installed: pip install "qlora_ray[check]"'

# By kind: what it is, and what to do about it.
KINDS = {
    "rejected": ("cannot be used", "Left out of training; data.max_bad_fraction says how many may be."),
    "damaged": ("file that cannot be read to its end", "A run stops there. Write or download it again."),
    "duplicate": ("same as an earlier record", "Trained on that much more often. Keep one, or give it a weight."),
    "near_duplicate": ("nearly the same as an earlier record", "Look at the pairs; keep one where they say the same."),
    "leaked": ("validation record that is in training", "eval_loss looks too good. Take it out of one of the two."),
    "leaked_nearly": ("validation record that is nearly in training", "eval_loss looks a little too good."),
    "leaked_prompt": ("validation prompt that training answers", "Exact match measures memory there."),
    "cut": ("cut by training.max_length", "It loses its end, stop included. Raise max_length, or shorten it."),
    "left_out": ("something that the chat template leaves out", "The model never sees it. See data.chat_template."),
    "unclosed": ("answer after which no stop is trained on", "The model will not end there. See data.chat_template."),
    "unfinished": ("answer with an open ``` or <think>", "Often one that was cut when it was made."),
    "other_prompt": ("prompt tokenized otherwise alone than in its row", "Answers are generated from other tokens than "
                     "trained on. Look at where prompt and answer meet."),
    "short": ("answer of one token or none", "Right for labels; else an answer is missing."),
    "garbled": ("replacement characters or wrongly decoded text", "Read the source again in its own encoding."),
    "unseen_token": ("token that the base was never trained on", "It starts as noise. See data.chat_template."),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a record is."""

    unit: str  # line or record
    number: int
    file: str  # "" where there is but one

    def __str__(self) -> str:
        return f"{self.unit} {self.number}" + (f" of {self.file}" if self.file else "")


@dataclass
class Finding:
    """How many records show a fault, and some of them."""

    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, place: object, text: str, why: str = "") -> None:
        """Count one more, and keep it as an example where there are few."""
        self.count += 1
        if len(self.examples) < MOST_EXAMPLES:
            shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
            self.examples.append({"place": str(place), "why": why, "text": shown})


class Quality:
    """Looks at one record after the other, then at all of them together."""

    def __init__(self, config: Config, base: Base, tell: Callable[[str], None]):
        self._config, self._base, self._tell = config, base, tell
        self._findings = {kind: Finding() for kind in KINDS}
        self._reasons: Counter[str] = Counter()
        self._num_records = 0
        self._places: list[Place] = []  # of usable records
        self._num_usable = {"train_file": 0, "validation_file": 0}
        self._same, self._prompts = Groups(), Groups()
        self._near = NearGroups() if can_be_near() else None
        self._texts: dict[int, str] = {}  # of records that are like an earlier one

    def look(self, sources: dict[str, tuple[Source, ...]]) -> None:
        """Look at each record of the sources of "train_file" and "validation_file"."""
        self._has_one_file = sum(len(source.files) for of_key in sources.values() for source in of_key) == 1
        for key in self._num_usable:
            self._look(sources[key], key)

    def _look(self, sources: tuple[Source, ...], key: str) -> None:
        records = (located for source in sources for located in self._records(source))
        told = self._num_records
        while batch := list(itertools.islice(records, RECORDS_AT_ONCE)):
            encoded = self._base.encoder.encode([messages for _, messages in batch])
            for (place, messages), made in zip(batch, encoded, strict=True):
                if isinstance(made, BadRecord):
                    self._reject(place, made, text_of(messages))
                    continue
                self._num_usable[key] += 1
                self._compare(place, messages)
                for kind, why in faults_of(messages, made, self._base):
                    self._findings[kind].add(place, text_of(messages), why)
            if self._num_records - told >= RECORDS_A_LINE:
                told = self._num_records
                self._tell(f"checking: {told:,} records")

    def report(self) -> dict[str, Any]:
        """All that was found, as JSON holds it."""
        of_validation = self._of_validation()
        self._find_copies(of_validation)
        return {
            "num_records": self._num_records,
            "num_usable": len(self._places),
            "num_validation": int(of_validation.sum()),
            "rejected": dict(self._reasons.most_common()),
            "findings": {
                kind: {
                    "what": what, "records": found.count, "share": found.count / max(1, self._num_records),
                    "advice": advice, "examples": found.examples,
                }
                for (kind, (what, advice)), found in zip(KINDS.items(), self._findings.values(), strict=True)
            },
            "not_checked": self._not_checked(bool(of_validation.any())),
        }  # fmt: skip

    def _records(self, source: Source) -> Iterator[tuple[Place, Messages]]:
        """Each record that can be read, as messages; the others are counted."""
        for file in source.files:
            name, before = "" if self._has_one_file else file.name, 0
            try:
                unit = place_unit(file)
                for chunk in cut(file):
                    first, last = before if chunk.num_before is None else chunk.num_before, 0
                    for last, record in read(chunk):
                        if record is not BLANK:
                            yield from self._converted(Place(unit, first + last, name), record)
                    before = first + last
            except DamagedFile as error:
                self._findings["damaged"].add(file.name, "", str(error))

    def _converted(self, place: Place, record: Any) -> Iterator[tuple[Place, Messages]]:
        self._num_records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            yield place, convert(record, self._config.data.format, self._config.training.records)[0]
        except BadRecord as reason:
            self._reject(place, reason, "" if isinstance(record, BadRecord) else str(record))

    def _reject(self, place: Place, reason: BadRecord, text: str) -> None:
        self._reasons[str(reason)] += 1
        self._findings["rejected"].add(place, text, f"{reason}: {reason.detail}" if reason.detail else str(reason))

    def _compare(self, place: Place, messages: Messages) -> None:
        number = len(self._places)
        self._places.append(place)
        text = text_of(messages)
        prompt = text_of(halves(messages)[0][:-1]) or text
        like = [self._same.add(normalised(text)), self._prompts.add(normalised(prompt))]
        if self._near:
            spoken = [turn for turn in messages if turn["role"] not in ("system", "tools")]  # what differs by record
            like.append(self._near.add(normalised(text_of(spoken)), like[0]))
        if min(like) < number and len(self._texts) < MOST_TEXTS:
            self._texts[number] = text[: SHOWN_CHARACTERS + 1]

    def _of_validation(self) -> np.ndarray:
        """Which of the usable records are validation: (N,) bool."""
        num_train, num_given = self._num_usable.values()
        of_validation = np.arange(num_train + num_given) >= num_train
        if not self._config.data.validation_file and num_train:
            of_validation[held_out(num_train, self._config.data.validation_split, self._config.training.seed)] = True
        return of_validation

    def _find_copies(self, of_validation: np.ndarray) -> None:
        """Find what is a fault of a record only beside another one."""
        same, prompts = self._same.of(), self._prompts.of()
        near = self._near.of() if self._near else same
        train = np.flatnonzero(~of_validation)
        is_copy = _has_earlier(same, train)
        self._add_pairs("duplicate", same, train, is_copy)
        self._add_pairs("near_duplicate", near, train, _has_earlier(near, train) & ~is_copy)
        leaked = of_validation & np.isin(same, same[train])
        self._add_pairs("leaked", same, train, leaked)
        self._add_pairs("leaked_nearly", near, train, of_validation & np.isin(near, near[train]) & ~leaked)
        self._add_pairs("leaked_prompt", prompts, train, of_validation & np.isin(prompts, prompts[train]) & ~leaked)

    def _add_pairs(self, kind: str, of: np.ndarray, train: np.ndarray, is_found: np.ndarray) -> None:
        """Count the records, and show some, each with the first training record of its group."""
        numbers = np.flatnonzero(is_found)
        finding = self._findings[kind]
        for number in numbers[:MOST_EXAMPLES].tolist():
            other = int(train[np.flatnonzero(of[train] == of[number])[0]])
            text = self._texts.get(number) or self._texts.get(other, "")
            finding.add(self._places[number], text, f"like {self._places[other]}")
        finding.count = len(numbers)

    def _not_checked(self, has_validation: bool) -> dict[str, str]:
        """By kind, why it was not looked for, or not in full."""
        known: dict[str, str] = {}
        if self._near is None:
            known |= dict.fromkeys(("near_duplicate", "leaked_nearly"), f"datasketch {INSTALL}")
        elif self._near.is_full:
            known["near_duplicate"] = "there are too many different records: the last were not compared with each other"
        if not can_tell_mojibake():
            known["garbled"] = f"ftfy {INSTALL}; looked for replacement characters alone"
        if self._base.unseen_ids is None:
            known["unseen_token"] = "the base's embedding was not found"
        if not has_validation:
            known |= {kind: "there is no validation" for kind in KINDS if kind.startswith("leaked")}
        return known


def _has_earlier(of: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Whether a record of `among` has an earlier one of its group there: (N,) bool."""
    found = np.zeros(len(of), bool)
    found[among] = True
    found[among[np.unique(of[among], return_index=True)[1]]] = False
    return found
