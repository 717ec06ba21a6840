"""What is known of the rows once tokenized. Imports nothing heavy, so that the plan stays light."""

from dataclasses import dataclass, field


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

    @property
    def packing_efficiency(self) -> float:
        """Share of the rows' room that tokens fill."""
        return self.num_tokens / (self.num_rows * self.max_length) if self.num_rows and self.max_length else 0.0
