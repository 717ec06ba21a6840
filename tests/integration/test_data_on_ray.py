"""Ray Data tokenizes and carries: the same samples and rows as without it."""

import json
import threading

import numpy as np
import pytest

from qlora_ray.cluster import connect
from qlora_ray.config import Config
from qlora_ray.data import delivery, prepare
from qlora_ray.data import read as read_module
from qlora_ray.data.delivery import MICRO_BATCHES_PER_TASK, Stream, deliver, rows_at
from qlora_ray.data.order import Order
from qlora_ray.data.rows import Rows, open_rows
from qlora_ray.data.spread import run_on_ray
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


def test_tokenizing_on_ray_gives_the_rows_of_one_process(ray, path, tmp_path, monkeypatch):
    monkeypatch.setattr(read_module, "CHUNK_BYTES", 4096)
    config = Config.model_validate({"data": {"train_file": path}, "training": {"max_length": 64}})
    here = prepare.prepare(config, open_folder(str(tmp_path / "here")), packing=True)
    monkeypatch.setattr(prepare, "INLINE_BYTES", 0)
    asked = []

    def runner():
        asked.append(True)
        return run_on_ray

    there = prepare.prepare(config, open_folder(str(tmp_path / "there")), packing=True, runner=runner)
    assert asked == [True] and len(there.train[0].parts) > 3
    assert there.stats == here.stats and there.train[0].rejected_lines() == here.train[0].rejected_lines()
    for split in ("train", "validation"):
        one, other = Rows(here.entry, split), Rows(there.entry, split)
        assert one.gather(np.arange(len(one))).equals(other.gather(np.arange(len(other))))
    assert (there.entry / "prompts.json").read_bytes() == (here.entry / "prompts.json").read_bytes()
    again = prepare.prepare(config, open_folder(str(tmp_path / "there")), packing=True, runner=runner)
    assert asked == [True] and again == there


def test_rows_that_ray_data_carries_are_those_of_the_order(ray, path, tmp_path, monkeypatch):
    config = Config.model_validate({"data": {"train_file": path, "validation_split": 0}})
    made = prepare.prepare(config, open_folder(str(tmp_path)), packing=False)
    order = Order(made.stats.num_rows, seed=3, micro_batch_size=2, micro_batches_per_step=2)
    stream = Stream(made.entry, order, 1, 2, first_step=5, last_step=5 + 4 * MICRO_BATCHES_PER_TASK)
    wanted = [rows_at({"id": np.array([i])}, stream) for i in range(stream.num_micro_batches)]
    directly = []
    monkeypatch.setattr(delivery, "rows_at", lambda batch, stream: directly.append(1) or rows_at(batch, stream))

    carried = delivery._Carried(stream)
    for position in range(MICRO_BATCHES_PER_TASK, stream.num_micro_batches):  # wait for Ray Data each time
        while (table := carried.take(position)) is None:
            pass
        assert table.equals(wanted[position])
    carried.stop()

    assert [table.to_pylist() for table in deliver(stream)] == [table.to_pylist() for table in wanted]
    assert len(directly) >= MICRO_BATCHES_PER_TASK
    open_rows.cache_clear()
