"""python -m tests.integration.many_runs: trains a JSON list of configs from stdin, all in the same worker processes."""

import json
import sys
from typing import Any

from qlora_ray import storage
from qlora_ray.cluster import connect
from qlora_ray.config import make_config
from qlora_ray.data.prepare import prepare
from qlora_ray.door import shut_ray_down
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.plan import Hardware, layout, make_plan
from qlora_ray.rundir import directory
from qlora_ray.worker.messages import Run


def made(values: dict[str, Any]) -> Run:
    """The run of a config, ready for its workers."""
    config = make_config(values)
    folder, facts = storage.open_folder(config.ray.storage_path), exact_facts(config)
    data = prepare(config, folder, layout(config, facts))
    plan = make_plan(config, data.stats, facts, Hardware(num_cpus=2, num_gpus=0), None)
    run = folder / str(config.ray.run_name)
    ground = directory.Ground(directory.run_identity(config, data.stats, facts, plan), {"versions": {}}, {})
    directory.write_run_files(run, config, plan, data.stats, ground)
    return Run(config, plan, run, data.entry, data.stats.fingerprint, debug=False)


def train_one_after_the_other(job: dict[str, Any]) -> None:
    """What each worker does."""
    from qlora_ray.worker.loop import run_worker

    for run in job["runs"]:
        run_worker(run, job["channel"])


def main() -> None:
    """Train them all. Raises what a worker raises."""
    runs = [made(values) for values in json.load(sys.stdin)]
    first = runs[0]
    connect.set_environment(first.config, debug=False)
    connect.start_ray(first.config, debug=False)
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from qlora_ray.driver.channel import Channel

    channel: Any = Channel
    TorchTrainer(
        train_one_after_the_other, train_loop_config={"runs": runs, "channel": channel.remote()},
        scaling_config=ScalingConfig(num_workers=first.plan.num_workers),
        run_config=RunConfig(storage_path=f"{first.folder.parent.path}/.ray"),
    ).fit()  # fmt: skip
    shut_ray_down(debug=False)


if __name__ == "__main__":
    main()
