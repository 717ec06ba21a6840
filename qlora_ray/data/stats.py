"""What is known of the rows once tokenized. Imports nothing heavy, so that the plan stays light."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataStats:
    """Counts of the training rows: the driver's copy, and part of the cache."""

    fingerprint: str
    num_records: int
    num_rejected: int
    num_truncated: int
    num_rows: int
    num_validation_rows: int
    num_tokens: int
    num_label_tokens: int
    longest_row: int
