"""Which rows make which batch depends on seed, epoch and step only."""

from dataclasses import replace

import numpy as np
import pytest

from qlora_ray.data.delivery import Stream, deliver, rows_at
from qlora_ray.data.order import NO_ROW, Order, held_out, longest_first, micro_batches_of, permutation
from qlora_ray.data.rows import Rows, sample_digest
from qlora_ray.data.tokenize import IGNORE_INDEX, Sample
from tests.made_rows import make_entry

CASES = 60


def random_order(case: int) -> Order:
    random = np.random.default_rng(case)
    return Order(
        num_rows=int(random.integers(1, 300)),
        seed=int(random.integers(0, 2**32)),
        micro_batch_size=int(random.integers(1, 9)),
        micro_batches_per_step=int(random.integers(1, 17)),
    )


@pytest.mark.parametrize("case", range(CASES))
def test_each_row_comes_exactly_once_an_epoch(case):
    order = random_order(case)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        rows = np.concatenate([order.rows_of_step(step).ravel() for step in steps])
        assert sorted(rows[rows != NO_ROW]) == list(range(order.num_rows))
        assert (rows == NO_ROW).sum() < order.global_batch_size
        assert {order.epoch_of(step) for step in steps} == {epoch}


@pytest.mark.parametrize("num_workers", range(1, 17))
def test_global_batch_is_the_same_for_any_number_of_workers(num_workers):
    micro_batches = 720720 // 1001  # 720 = a multiple of most numbers up to 16
    micro_batches -= micro_batches % num_workers
    for seed in range(3):
        order = Order(num_rows=2500, seed=seed, micro_batch_size=2, micro_batches_per_step=micro_batches)
        one = order.rows_of_step(1)
        shares = [
            [order.rows_of_micro_batch(1, m) for m in micro_batches_of(rank, num_workers, micro_batches)]
            for rank in range(num_workers)
        ]
        assert {len(share) for share in shares} == {micro_batches // num_workers}
        together = np.concatenate([rows for share in shares for rows in share])
        assert sorted(together) == sorted(one.ravel())


def test_a_short_last_batch_is_short_by_at_most_one_row_a_micro_batch():
    for case in range(CASES):
        order = random_order(case)
        filled = (order.rows_of_step(order.steps_per_epoch - 1) != NO_ROW).sum(axis=1)
        assert filled.max() - filled.min() <= 1


def test_rows_of_a_step_do_not_depend_on_what_was_asked_before():
    for case in range(CASES):
        order = random_order(case)
        last = 3 * order.steps_per_epoch
        forward = [order.rows_of_step(step).tolist() for step in range(last)]
        fresh = Order(**vars(order))
        assert [fresh.rows_of_step(step).tolist() for step in reversed(range(last))] == forward[::-1]


def test_epochs_and_seeds_give_different_orders():
    first, other = (Order(100, seed, 10, 10) for seed in (1, 2))
    assert len({tuple(order.rows_of_step(step).ravel()) for order in (first, other) for step in range(5)}) == 10


def test_shuffled_orders_are_those_of_runs_begun_long_ago():
    assert permutation(12, 7, 0).tolist() == [0, 1, 9, 3, 11, 5, 2, 6, 10, 7, 8, 4]
    assert permutation(12, 7, 1).tolist() == [1, 8, 5, 2, 9, 11, 0, 4, 3, 7, 10, 6]


def test_rows_that_are_not_shuffled_come_as_they_stand_in_every_epoch():
    for case in range(CASES):
        order = replace(random_order(case), is_shuffled=False)
        for epoch in range(2):
            steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            rows = np.concatenate([order.rows_of_step(step).T.ravel() for step in steps])
            assert rows[rows != NO_ROW].tolist() == list(range(order.num_rows))


def test_longest_first_is_sorted_and_only_equal_lengths_depend_on_the_seed():
    lengths = np.random.default_rng(0).integers(1, 9, 200)
    some, again, other = (longest_first(lengths, seed) for seed in (1, 1, 2))
    assert sorted(some) == list(range(200)) and some.tolist() == again.tolist() != other.tolist()
    assert lengths[some].tolist() == lengths[other].tolist() == sorted(lengths, reverse=True)


def test_held_out_rows_are_distinct_in_range_and_as_many_as_asked():
    for num_rows in (1, 2, 10, 999):
        for fraction in (0.001, 0.1, 0.5, 0.99):
            rows = held_out(num_rows, fraction, seed=7)
            assert len(set(rows)) == len(rows) == max(1, round(num_rows * fraction))
            assert rows.min() >= 0 and rows.max() < num_rows
    assert len(held_out(10, 0, seed=7)) == 0


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """A cache entry of 23 rows, row i holding sample i: i + 1 times the token i."""
    samples = [Sample([i] * (i + 1), [(max(1, i // 2), i + 1)] if i else [], False) for i in range(23)]
    folder = tmp_path_factory.mktemp("cache")
    return make_entry(folder, samples, [[i] for i in range(23)], packed=False), samples


@pytest.mark.parametrize("num_workers", [1, 2, 3, 6])
def test_delivered_rows_are_those_the_order_names(entry, num_workers):
    folder, rows = entry
    order = Order(num_rows=23, seed=5, micro_batch_size=3, micro_batches_per_step=6)
    seen = {}
    for rank in range(num_workers):
        stream = Stream(folder, order, rank, num_workers, first_step=1, last_step=5)
        table = rows_at({"id": np.arange(stream.num_micro_batches)}, stream)
        for line in table.to_pylist():
            seen.setdefault((line["step"], line["micro_batch"]), []).append((line["input_ids"], line["labels"]))
    assert sorted(seen) == [(step, micro) for step in range(1, 5) for micro in range(6)]
    for (step, micro), got in seen.items():
        wanted = order.rows_of_step(step)[micro]
        assert len(got) == 3
        for number, (ids, labels) in zip(wanted, got, strict=True):
            if number == NO_ROW:
                assert set(labels) == {IGNORE_INDEX} and len(labels) == len(ids)
            else:
                assert (ids, labels) == (rows[number].input_ids, rows[number].labels)


def test_stream_resumed_in_the_middle_goes_on_with_the_same_rows(entry):
    folder, _ = entry
    order = Order(num_rows=23, seed=5, micro_batch_size=3, micro_batches_per_step=4)
    whole, rest = (Stream(folder, order, 1, 2, first, 9) for first in (0, 6))
    all_rows = rows_at({"id": np.arange(whole.num_micro_batches)}, whole)
    skipped = 6 * 2 * 3  # steps x micro-batches of this worker x rows
    assert rows_at({"id": np.arange(rest.num_micro_batches)}, rest).equals(all_rows.slice(skipped))


@pytest.mark.parametrize("case", range(20))
def test_any_worlds_and_kill_points_give_the_same_global_batches(entry, case):
    """A run that is killed at random steps and goes on with other worker numbers reads what an unbroken one reads."""
    folder, _ = entry
    random = np.random.default_rng(case)
    micro_batches = int(random.choice([1, 2, 4, 6, 12, 16, 48, 720]))
    worlds = [n for n in range(1, 17) if micro_batches % n == 0]
    order = Order(int(random.integers(1, 24)), int(random.integers(2**32)), int(random.integers(1, 4)), micro_batches)
    last = 3 * order.steps_per_epoch
    step, seen = 0, []
    while step < last:
        stop, workers = int(random.integers(step + 1, last + 1)), int(random.choice(worlds))
        streams = [Stream(folder, order, rank, workers, step, last) for rank in range(workers)]
        for position in range((stop - step) * (micro_batches // workers)):
            for stream in streams:
                place = stream.place(position)
                assert step <= place[0] < stop
                seen.append((place, order.rows_of_micro_batch(*place)))
        step = stop
    places = [place for place, _ in seen]
    assert sorted(places) == [(step, micro) for step in range(last) for micro in range(micro_batches)]
    for epoch in range(3):
        rows = np.concatenate([rows for (step, _), rows in seen if order.epoch_of(step) == epoch])
        assert sorted(rows[rows != NO_ROW]) == list(range(order.num_rows))


def test_stream_starts_in_the_middle_of_an_epoch_without_going_through_what_came_before(entry):
    folder, _ = entry
    order = Order(num_rows=23, seed=5, micro_batch_size=1, micro_batches_per_step=2)
    far = 10**12 * order.steps_per_epoch + 7
    table = next(deliver(Stream(folder, order, 0, 2, far, far + 5)))
    assert table["step"].to_pylist() == [far]
    assert len(table["input_ids"][0]) == order.rows_of_step(far)[0, 0] + 1


def test_sample_digest_is_the_hash_that_the_documentation_describes(entry):
    import hashlib

    folder, _ = entry
    rows = Rows(folder, "train")
    order = Order(num_rows=23, seed=5, micro_batch_size=3, micro_batches_per_step=4)
    for step in range(4):
        numbers = order.rows_of_step(step).T.ravel()  # row i holds sample i
        numbers = numbers[numbers != NO_ROW]
        by_hand = hashlib.sha256(b"".join(int(n).to_bytes(8, "little") for n in numbers)).hexdigest()[:16]
        assert sample_digest(rows, order, step) == by_hand
        shapes = [Order(23, 5, size, 12 // size) for size in (1, 2, 6, 12)]
        assert {sample_digest(rows, shape, step) for shape in shapes} == {by_hand}
