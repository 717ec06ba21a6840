"""From what a config names to cached rows, before any worker or process group exists."""

import dataclasses
import datetime
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qlora_ray.config import Config, base_model_path
from qlora_ray.data.check import refuse_missing, refuse_one_kind, refuse_too_many
from qlora_ray.data.deal import Read, Share, deal
from qlora_ray.data.order import longest_first
from qlora_ray.data.pack import pack, pack_in_order
from qlora_ray.data.pairs import label_of
from qlora_ray.data.rows import as_pairs, find, write_rows, write_stats
from qlora_ray.data.samples import INLINE_BYTES, Runner, Samples, Tell, fingerprint, run_inline, samples_of
from qlora_ray.data.sources import Source, find_sources
from qlora_ray.data.stats import DataStats, Layout
from qlora_ray.data.template import ASKS_DATE, find_template
from qlora_ray.data.tokenize import prompt_of, tokenizer_files
from qlora_ray.data.work import Recipe, encoder_of
from qlora_ray.errors import ConfigError
from qlora_ray.storage import Folder

MOST_PROMPTS = 1000
DATE_FILE = "date.txt"  # in the cache: the day that templates print


@dataclass(frozen=True)
class Prepared:
    """Where the rows are, what is known of them, and the samples that they are made of."""

    entry: Folder
    stats: DataStats
    train: tuple[Samples, ...]
    validation: tuple[Samples, ...]  # empty where split off


def prepare(
    config: Config,
    storage: Folder,
    how: Layout,
    runner: Callable[[], Runner] | None = None,
    tell: Tell = lambda line: None,
) -> Prepared:
    """Tokenize, mask, pack and cache the rows of a run, or find them cached. Raises ConfigError for unusable data.

    `runner` is asked for only where there is much to tokenize; without it all is done in this process. `tell` gets a
    line now and then where that takes long.
    """
    cache = storage / "cache"
    recipe = with_date(make_recipe(config), config, cache)
    sources = {key: find_sources(config, key) for key in ("train_file", "validation_file")}
    for source in itertools.chain.from_iterable(sources.values()):
        if source.note:
            tell(source.note)
    done = {
        key: tuple(samples_of(source, recipe, cache, _runner_for(source, runner), tell) for source in of_key)
        for key, of_key in sources.items()
    }
    for key in sources:
        for source, samples in zip(sources[key], done[key], strict=True):
            refuse_too_many(source, samples.num_records, samples.rejected, config.data.max_bad_fraction)
            refuse_missing(source, samples.num_records, samples.missing, config.data.max_bad_fraction)
    read = Read(sources, done)
    entry = cache / _rows_fingerprint(config, read, how)
    stats = find(entry)
    if stats is None:
        stats = _make_rows(config, recipe, entry, read, how)
    return Prepared(entry, stats, done["train_file"], done["validation_file"])


def make_recipe(config: Config) -> Recipe:
    """How the config asks for records to be turned into tokens. Raises ConfigError."""
    model, data = config.model, config.data
    return Recipe(
        base=base_model_path(model.base_model), revision=model.revision, trust_remote_code=model.trust_remote_code,
        chat_template=find_template(data.chat_template), format=data.format, train_on=data.train_on,
        max_length=config.training.max_length, keep_thoughts=data.keep_thoughts,
        new_tokens=tuple(model.new_tokens), records=config.training.records,
    )  # fmt: skip


def with_date(recipe: Recipe, config: Config, cache: Folder) -> Recipe:
    """The recipe with the day that its template shall print: data.date, else that of the first time in this cache."""
    files = tokenizer_files(recipe.base, recipe.revision)
    texts = [file.read_bytes() for file in files] if recipe.chat_template is None else [recipe.chat_template.encode()]
    if not any(ASKS_DATE.encode() in text for text in texts):
        if config.data.date is not None:
            raise ConfigError(f"data.date={config.data.date}: the chat template prints no date. Leave it out.")
        return recipe
    kept = cache / DATE_FILE
    if config.data.date is None and not kept.exists():
        kept.write_bytes(datetime.date.today().isoformat().encode())
    return dataclasses.replace(recipe, date=config.data.date or kept.read_bytes().decode())


def _runner_for(source: Source, runner: Callable[[], Runner] | None) -> Runner:
    return run_inline if runner is None or source.num_bytes <= INLINE_BYTES else lambda *task: runner()(*task)


def _rows_fingerprint(config: Config, read: Read, how: Layout) -> str:
    made_of = {
        key: [
            (samples.entry.name, source.entry.weight) for source, samples in zip(of_key, read.samples[key], strict=True)
        ]
        for key, of_key in read.sources.items()
    }
    split = None if read.samples["validation_file"] else config.data.validation_split
    training = config.training
    parts = (made_of, split, training.seed, how.packing, training.max_length, config.data.order, how.shares_prompts)
    return fingerprint([repr(parts)])


def _make_rows(config: Config, recipe: Recipe, entry: Folder, read: Read, how: Layout) -> DataStats:
    """Write an entry of rows: which samples each holds, and the held-out prompts."""
    max_length, is_twofold = config.training.max_length, recipe.records != "answers"
    (train, held), done = deal(config, read), read.samples
    if recipe.records == "labels":
        refuse_one_kind(train.index.is_desirable[train.samples].tolist(), "data.train_file, less what is held out")
        if config.training.metric_for_best_model != "eval_loss":
            by = f"validation, by {config.training.metric_for_best_model}"
            refuse_one_kind(held.index.is_desirable[held.samples].tolist(), by)
    lengths_of_rows, longest = {}, {}
    for split, share in (("train", train), ("validation", held)):
        order = config.data.order if split == "train" else "shuffled"
        offsets, samples = _samples_of_rows(config, share, how, order)
        lengths = _lengths_in_rows(config, share, how, (offsets, samples))
        lengths_of_rows[split] = write_rows(entry, split, (offsets, samples), share.index, lengths)
        longest[split] = int(lengths_of_rows[split].max(initial=0))
        if is_twofold and not how.shares_prompts:
            longest[split] = _longest_half(lengths, offsets)
    stats = DataStats(
        fingerprint=entry.name,
        num_records=sum(samples.num_records for samples in done["train_file"]),
        num_rejected=sum(samples.num_rejected for samples in done["train_file"]),
        num_truncated=sum(samples.num_truncated for samples in done["train_file"]),
        num_rows=len(lengths_of_rows["train"]),
        num_validation_rows=len(lengths_of_rows["validation"]),
        num_tokens=int(lengths_of_rows["train"].sum()),
        num_label_tokens=int(train.index.num_label_tokens[train.samples].sum()),
        longest_row=longest["train"],
        num_samples=len(train.samples),
        num_validation_samples=len(held.samples),
        packed=how.packing,
        max_length=max_length,
        formats=dict(sum((Counter(samples.formats) for samples in done["train_file"]), Counter())),
        missing=_sum([samples.missing for samples in done["train_file"]]),
        unused=_sum([samples.unused for samples in done["train_file"]]),
        template_notes=encoder_of(recipe).notes(),
        date=recipe.date,
        pairs=is_twofold,
        labelled=recipe.records == "labels",
        shares_prompts=how.shares_prompts,
    )
    held_key = "validation_file" if done["validation_file"] else "train_file"
    prompts = _prompts(recipe, done[held_key], held)
    (entry / "prompts.json").write_bytes(json.dumps(prompts, ensure_ascii=False).encode())
    names = {"train": done["train_file"], "validation": done[held_key]}
    entries = {split: [samples.entry.name for samples in made] for split, made in names.items()}
    write_stats(entry, stats, entries, encoder_of(recipe).tokenizer.chat_template)
    return stats


def _samples_of_rows(config: Config, share: Share, how: Layout, order: str) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, samples): row r holds samples[offsets[r]:offsets[r+1]], as rows.py has them."""
    lengths, max_length, seed = share.index.num_tokens, config.training.max_length, config.training.seed
    if config.training.records == "labels":
        return _labelled_rows(config, share, how, order)
    if config.training.records == "answers":
        offsets, places = _rows_of(lengths[share.samples], max_length, (how.packing, order), seed)
        return offsets, share.samples[places]
    chosen = share.samples[share.samples % 2 == 0]  # each record has made two, the chosen one first
    if how.shares_prompts:
        of_pairs = lengths[chosen] + lengths[chosen + 1] - share.index.num_shared[chosen + 1]
        offsets, places = _rows_of(of_pairs, 2 * max_length, (how.packing, order), seed)
    else:
        longer = np.maximum(lengths[chosen], lengths[chosen + 1])
        offsets, places = _rows_of(longer, max_length, (how.packing, order), seed)
    return as_pairs(offsets, chosen[places], how.shares_prompts)


def _labelled_rows(config: Config, share: Share, how: Layout, order: str) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, samples) of rows of labelled answers: as many other answers follow, in a round drawn with the seed."""
    seed, max_length, samples = config.training.seed, config.training.max_length, share.samples
    round_of = np.random.Generator(np.random.Philox(key=[seed, 2**63 + 1])).permutation(len(samples))
    others = np.empty_like(samples)
    others[round_of] = samples[np.roll(round_of, 1)]
    both = np.stack([samples, others])
    longer = _behind_prompts(share, both).clip(max=max_length).max(0)
    offsets, places = _rows_of(longer, max_length, (how.packing, order), seed)
    sizes = np.diff(offsets)
    inside = np.arange(len(places)) - np.repeat(offsets[:-1], sizes)
    firsts = np.repeat(2 * offsets[:-1], sizes) + inside
    held = np.empty(2 * len(places), np.int64)
    held[firsts], held[firsts + np.repeat(sizes, sizes)] = both[0, places], both[1, places]
    return 2 * offsets, held


def _behind_prompts(share: Share, both: np.ndarray) -> np.ndarray:
    """Tokens of answers, each behind the prompt of the first row's sample: (2, N)."""
    lengths, starts = share.index.num_tokens, share.index.num_shared
    return lengths[both] - starts[both] + starts[both[0]]


def _lengths_in_rows(
    config: Config, share: Share, how: Layout, held: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:  # fmt: skip
    """Tokens that each sample has in its row: without what it shares, or behind another prompt."""
    offsets, samples = held
    if config.training.records != "labels":
        return share.index.num_tokens[samples] - share.index.num_shared[samples] * how.shares_prompts
    halves = np.diff(offsets) // 2
    place = np.arange(len(samples)) - np.repeat(offsets[:-1], 2 * halves)
    first = np.arange(len(samples)) - np.where(place < np.repeat(halves, 2 * halves), 0, np.repeat(halves, 2 * halves))
    starts = share.index.num_shared
    lengths = share.index.num_tokens[samples] - starts[samples] + starts[samples[first]]
    return np.minimum(lengths, config.training.max_length)


def _longest_half(lengths: np.ndarray, offsets: np.ndarray) -> int:
    """Tokens of the longest row of tokens, of which each row of pairs is two; 0 where there is none."""
    edges = np.unique(np.concatenate([offsets, (offsets[:-1] + offsets[1:]) // 2]))
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return int(np.diff(before[edges]).max(initial=0))


def _rows_of(lengths: np.ndarray, room: int, how: tuple[bool, str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, places): row r, of so much room, holds what stands at places[offsets[r]:offsets[r+1]] of `lengths`.

    `how` is whether rows are packed, and data.order.
    """
    packing, order = how
    if packing and order == "shuffled":
        return pack(lengths, room, seed)
    places = longest_first(lengths, seed) if order == "by_length" else np.arange(len(lengths))
    return pack_in_order(lengths[places], room) if packing else np.arange(len(lengths) + 1), places


def _sum(counted: list[dict[str, tuple[int, str]]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counts in counted:
        total.update({kind: count for kind, (count, _) in counts.items()})
    return dict(total)


def _prompts(recipe: Recipe, samples: tuple[Samples, ...], held: Share) -> list[dict]:
    """The first held-out questions and their expected answers."""
    wanted = set(held.records.tolist())
    if not wanted:
        return []
    tokenizer = encoder_of(recipe).tokenizer
    made = (
        prompt_of(tokenizer, messages)
        for one, before in zip(samples, held.index.records_before.tolist(), strict=False)
        for record, messages in one.messages()
        if before + record in wanted and label_of(messages) is not False
    )
    return list(itertools.islice((prompt for prompt in made if prompt), MOST_PROMPTS))
