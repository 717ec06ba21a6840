"""What is known of the rows once tokenized. Imports nothing heavy, so that the plan stays light."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """What a row holds."""

    packing: bool  # as many samples, or pairs, as it has room for; else one
    shares_prompts: bool = False  # of pairs both answers, behind one copy of what both begin with


@dataclass(frozen=True)
class DataStats:
    """Counts of an epoch of training rows: the driver's copy, and part of the cache."""

    fingerprint: str
    num_records: int  # training records read, rejected ones too
    num_rejected: int
    num_truncated: int
    num_rows: int
    num_validation_rows: int
    num_tokens: int  # of an epoch, padding not counted
    num_label_tokens: int
    longest_row: int  # in tokens
    num_samples: int = 0  # that the rows of an epoch hold
    num_validation_samples: int = 0
    packed: bool = False
    max_length: int = 0
    formats: dict[str, int] = field(default_factory=dict)  # usable records by format
    missing: dict[str, int] = field(default_factory=dict)  # training records, by kind of what their texts lack
    unused: dict[str, int] = field(default_factory=dict)  # training records, by field that no format reads
    template_notes: tuple[str, ...] = ()
    date: str | None = None  # that the chat template prints
    pairs: bool = False  # of answers, chosen and rejected
    labelled: bool = False  # rows as of pairs: each answer, and its prompt with another answer, which KTO measures from
    shares_prompts: bool = False  # a row has both answers of its pairs; else it is two of tokens, one with each

    @property
    def rows_of_tokens(self) -> int:
        """Rows of tokens that each row is read as."""
        return 2 if self.pairs and not self.shares_prompts else 1

    @property
    def samples_of_record(self) -> int:
        """Conversations that each record holds."""
        return 2 if self.pairs and not self.labelled else 1

    @property
    def longest_sample(self) -> int:
        """Tokens that a sample, with its prompt, has at most."""
        return min(self.longest_row, self.max_length) if self.shares_prompts else self.longest_row

    @property
    def packing_efficiency(self) -> float:
        """Share of the rows' room that tokens fill."""
        return self.num_tokens / room if (room := self.num_rows * self.samples_of_record * self.max_length) else 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the plan should know of the texts: what they lack, and what the template does."""
        left_out = [
            f"The chat template leaves out {kind}, in {count:,} of {self.num_records:,} records."
            for kind, count in self.missing.items()
        ]
        fields = ", ".join(f"{name} ({count:,})" for name, count in self.unused.items())
        return (*left_out, *([f"Fields that no format reads, with records: {fields}."] if fields else []),
                *self.template_notes)  # fmt: skip
