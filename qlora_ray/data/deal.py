"""Which samples are trained on and which are held out, and how often each comes in an epoch. Holds counts only."""

from dataclasses import dataclass

import numpy as np

from qlora_ray.config import Config
from qlora_ray.data.order import held_out
from qlora_ray.data.samples import Samples
from qlora_ray.data.sources import Source
from qlora_ray.errors import ConfigError


@dataclass(frozen=True)
class Index:
    """What the driver knows of the samples of a split: S samples, numbered through its sources."""

    num_tokens: np.ndarray  # (S,)
    num_label_tokens: np.ndarray
    num_shared: np.ndarray  # first tokens of a rejected sample that may be read in the chosen one before it
    is_desirable: np.ndarray  # whether a sample's answer is, where records are labelled
    record: np.ndarray  # usable record that the sample is of, numbered through the sources
    records_before: np.ndarray  # (sources + 1,)

    @classmethod
    def of(cls, samples: tuple[Samples, ...]) -> "Index":
        """Of the samples of each source, records numbered through all of them."""
        before = np.cumsum([0, *(one.num_usable for one in samples)])
        each = [one.index() for one in samples]
        return cls(
            np.concatenate([one["num_tokens"] for one in each]),
            np.concatenate([one["num_label_tokens"] for one in each]),
            np.concatenate([one["num_shared"] for one in each]),
            np.concatenate([one["is_desirable"] for one in each]),
            np.concatenate([one["record"] + first for one, first in zip(each, before[:-1], strict=True)]),
            before,
        )

    @property
    def num_records(self) -> int:
        """Usable records of all sources."""
        return int(self.records_before[-1])

    def weighted(self, records: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
        """Numbers of the samples of these records, each as often as its source's weight says.

        A weight of w gives each record floor(w) times, and a seeded choice of round((w - floor(w)) x n) once more.
        """
        times = np.zeros(self.num_records, np.int64)
        for i, weight in enumerate(weights):
            first, last = np.searchsorted(records, self.records_before[i : i + 2])
            of_source = records[first:last]
            whole = int(weight)
            times[of_source] = whole
            random = np.random.Generator(np.random.Philox(key=[seed, 2**63 + 2 + i]))
            times[random.permutation(of_source)[: round((weight - whole) * len(of_source))]] += 1
        return np.repeat(np.arange(len(self.record)), times[self.record])


@dataclass(frozen=True)
class Share:
    """A split's part of its sources."""

    index: Index
    records: np.ndarray  # usable records, ascending
    samples: np.ndarray  # their samples, each as often as it comes in an epoch


@dataclass(frozen=True)
class Read:
    """What was read, by train_file and validation_file, and the samples that were made of it."""

    sources: dict[str, tuple[Source, ...]]
    samples: dict[str, tuple[Samples, ...]]


def deal(config: Config, read: Read) -> tuple[Share, Share]:
    """The training and the validation split of an epoch. Raises ConfigError where nothing is left to train on."""
    seed, fraction = config.training.seed, config.data.validation_split
    weights = {key: [source.entry.weight for source in of_key] for key, of_key in read.sources.items()}
    train = Index.of(read.samples["train_file"])
    kept = np.arange(train.num_records)
    if read.samples["validation_file"]:
        index = Index.of(read.samples["validation_file"])
        records = np.arange(index.num_records)
        held = Share(index, records, index.weighted(records, weights["validation_file"], seed))
    else:
        records = held_out(train.num_records, fraction, seed)
        kept = np.setdiff1d(kept, records, assume_unique=True)
        held = Share(train, records, train.weighted(records, [1.0] * len(weights["train_file"]), seed))
    if not len(kept):
        raise ConfigError(
            f"data.validation_split={fraction}: holds out all {len(records)} usable records of data.train_file. "
            "Set it to 0 or bring more records."
        )
    share = Share(train, kept, train.weighted(kept, weights["train_file"], seed))
    if not len(share.samples):
        raise ConfigError("data.train_file: with these weights no record is left. Raise a weight.")
    return share, held
