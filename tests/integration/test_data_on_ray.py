"""Several processes, or Ray Data, tokenize; Ray Data carries: the same samples and rows as of one process."""

import json
import multiprocessing
import threading

import numpy as np
import pytest

from qlora_ray.cluster import connect
from qlora_ray.config import Config
from qlora_ray.data import delivery, prepare
from qlora_ray.data import read as read_module
from qlora_ray.data.delivery import MICRO_BATCHES_PER_TASK, Stream, deliver, rows_at
from qlora_ray.data.order import Order
from qlora_ray.data.read import cut
from qlora_ray.data.rows import Rows, open_rows
from qlora_ray.data.sources import find_sources
from qlora_ray.data.spread import run_on_cores, run_on_ray
from qlora_ray.data.stats import Layout
from qlora_ray.errors import ProcessDied
from qlora_ray.storage import open_folder


@pytest.fixture(scope="module")
def ray():
    import ray

    connect.set_environment(Config(), debug=False)
    connect.start_ray(Config(), debug=False)
    yield ray
    for thread in threading.enumerate():  # one that asked Ray for rows after its end would end this process
        if thread.name == "ray-data" or thread.name.startswith("StreamingExecutor"):
            thread.join(60)
    ray.shutdown()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.jsonl"
    records = [{"instruction": f"Say {i}.", "output": f"{i} " + "word " * (i % 9)} for i in range(400)]
    records[77] = {"instruction": "x"}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("spread", [run_on_ray, run_on_cores])
def test_tokenizing_at_once_gives_the_rows_of_one_process(spread, ray, path, tmp_path, monkeypatch):
    monkeypatch.setattr(read_module, "CHUNK_BYTES", 4096)
    config = Config.model_validate({"data": {"train_file": path}, "training": {"max_length": 64}})
    here = prepare.prepare(config, open_folder(str(tmp_path / "here")), how=Layout(packing=True))
    monkeypatch.setattr(prepare, "INLINE_BYTES", 0)
    asked = []

    def runner():
        asked.append(True)
        return spread

    there = prepare.prepare(config, open_folder(str(tmp_path / "there")), how=Layout(packing=True), runner=runner)
    assert asked == [True] and len(there.train[0].parts) > 3
    assert there.stats == here.stats and there.train[0].rejected_lines() == here.train[0].rejected_lines()
    for split in ("train", "validation"):
        one, other = Rows(here.entry, split), Rows(there.entry, split)
        assert one.gather(np.arange(len(one))).equals(other.gather(np.arange(len(other))))
    assert (there.entry / "prompts.json").read_bytes() == (here.entry / "prompts.json").read_bytes()
    again = prepare.prepare(config, open_folder(str(tmp_path / "there")), how=Layout(packing=True), runner=runner)
    assert asked == [True] and again == there


def test_process_that_ends_before_its_chunk_ends_all_with_the_reason(path, tmp_path):
    config = Config.model_validate({"data": {"train_file": path}})
    recipe, (source,) = prepare.make_recipe(config), find_sources(config, "train_file")
    chunks = cut(source.files[0]) * 3
    entry = open_folder(str(tmp_path / "entry"))
    done = run_on_cores(chunks, recipe, entry)
    next(done)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(ProcessDied, match="a process that tokenizes ended with exit code -9"):
        list(done)
    assert not multiprocessing.active_children()


def test_full_disk_is_told_as_such_by_the_process_that_met_it(path, tmp_path):
    config = Config.model_validate({"data": {"train_file": path}})
    recipe, (source,) = prepare.make_recipe(config), find_sources(config, "train_file")
    (tmp_path / "entry").write_text("a file in the folder's place")
    with pytest.raises(OSError, match="entry"):
        list(run_on_cores(cut(source.files[0]), recipe, open_folder(str(tmp_path / "entry"))))


def test_rows_that_ray_data_carries_are_those_of_the_order(ray, path, tmp_path, monkeypatch):
    config = Config.model_validate({"data": {"train_file": path, "validation_split": 0}})
    made = prepare.prepare(config, open_folder(str(tmp_path)), how=Layout(packing=False))
    order = Order(made.stats.num_rows, seed=3, micro_batch_size=2, micro_batches_per_step=2)
    stream = Stream(made.entry, order, 1, 2, first_step=5, last_step=5 + 4 * MICRO_BATCHES_PER_TASK)
    wanted = [rows_at({"id": np.array([i])}, stream) for i in range(stream.num_micro_batches)]
    directly = []
    monkeypatch.setattr(delivery, "rows_at", lambda batch, stream: directly.append(1) or rows_at(batch, stream))
    most = stream.order.micro_batch_size * int(open_rows(made.entry, "train").num_tokens.max())
    monkeypatch.setattr(delivery, "TOKENS_PER_TASK", 7 * most)  # as if rows were long
    assert delivery.micro_batches_per_task(stream) == 7

    carried = delivery._Carried(stream)
    for position in range(MICRO_BATCHES_PER_TASK, stream.num_micro_batches):  # wait for Ray Data each time
        while (table := carried.take(position)) is None:
            pass
        assert table.equals(wanted[position])
    carried.stop()

    assert [table.to_pylist() for table in deliver(stream)] == [table.to_pylist() for table in wanted]
    assert len(directly) >= MICRO_BATCHES_PER_TASK
    open_rows.cache_clear()
