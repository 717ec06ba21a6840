"""Trains many configs on one Ray, those of one number of workers in the same worker processes.

A run that comes again goes on from its first checkpoint, as if it had crashed there; `whole` is what it was before.
`python -m tests.integration.many_runs` takes a JSON list of configs from stdin.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from qlora_ray import storage
from qlora_ray.cluster import connect
from qlora_ray.config import make_config
from qlora_ray.data.prepare import prepare
from qlora_ray.door import shut_ray_down
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import make_plan
from qlora_ray.planning.rows import layout
from qlora_ray.rundir import directory
from qlora_ray.worker.messages import Run


def train(configs: list[dict[str, Any]], timeout: float = 1500) -> None:
    """Train them in a process of their own, one thread a worker."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.integration.many_runs"], input=json.dumps(configs), text=True,
        capture_output=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]


def whole(run: Path) -> Path:
    """Where a run lies as it was before it came again."""
    return run.with_name(f"{run.name}-whole")


def made(values: dict[str, Any]) -> Run:
    """The run of a config, ready for its workers."""
    config = make_config(values)
    folder, facts = storage.open_folder(config.ray.storage_path), exact_facts(config)
    data = prepare(config, folder, layout(config, facts))
    plan = make_plan(config, data.stats, facts, Hardware(num_cpus=config.ray.max_workers, num_gpus=0), None)
    run = folder / str(config.ray.run_name)
    ground = directory.Ground(directory.run_identity(config, data.stats, facts, plan), {"versions": {}}, {})
    directory.write_run_files(run, config, plan, data.stats, ground)
    return Run(config, plan, run, data.entry, data.stats.fingerprint, debug=False)


def train_one_after_the_other(job: dict[str, Any]) -> None:
    """What each worker does."""
    from qlora_ray.worker.loop import run_worker

    trained = set()
    for run in job["runs"]:
        if run.folder.path in trained:
            go_back(Path(run.folder.path))
        run_worker(run, job["channel"])
        trained.add(run.folder.path)


def go_back(run: Path) -> None:
    """Leave of a run what a crash after its first checkpoint leaves. Every worker must call this."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        shutil.copytree(run, whole(run))
        for later in sorted((run / "checkpoints").iterdir())[1:]:
            shutil.rmtree(later)
    dist.barrier()


def main() -> None:
    """Train them all. Raises what a worker raises."""
    runs = [made(values) for values in json.load(sys.stdin)]
    connect.set_environment(runs[0].config, debug=False)
    connect.start_ray(runs[0].config, debug=False)
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from qlora_ray.driver.channel import Channel

    channel: Any = Channel
    for num_workers, of_a_team in itertools.groupby(runs, lambda run: run.plan.num_workers):
        job = {"runs": list(of_a_team), "channel": channel.remote()}
        scaling = ScalingConfig(
            num_workers=num_workers, resources_per_worker={"CPU": min(1, (os.cpu_count() or 1) / num_workers)}
        )
        TorchTrainer(
            train_one_after_the_other, train_loop_config=job, scaling_config=scaling,
            run_config=RunConfig(storage_path=f"{runs[0].folder.parent.path}/.ray"),
        ).fit()  # fmt: skip
    shut_ray_down(debug=False)


if __name__ == "__main__":
    main()
