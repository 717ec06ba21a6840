"""Trains run after run in one process on one Ray, those of a number of workers in the same worker processes.

Imports, Ray and workers are what takes the time of a small run: here they start once for all tests. All else is the
product's: `run` goes through the door's main and the driver, `train` through preparation, plan and worker alone.
What a test says of a process (output, signals, death, environment) needs one of its own: tests/integration/door.py.
`python -m tests.integration.many_runs` takes a request a line from stdin, and ends with it.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_ray import laps, storage
from qlora_ray.cluster.node_facts import versions
from qlora_ray.config import Config, make_config
from qlora_ray.data.prepare import prepare
from qlora_ray.model.facts import ModelFacts
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.hardware import Hardware, check_workers_fit, resources_of_a_worker, uses_gpu
from qlora_ray.planning.plan import make_plan
from qlora_ray.planning.rows import layout
from qlora_ray.rundir import directory
from qlora_ray.worker.messages import Run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
POLL_SECONDS = 0.05


def run(*arguments: str, timeout: float = 400) -> subprocess.CompletedProcess:
    """Run python -m qlora_ray.train with arguments, one thread a worker."""
    code, out, err = _ask({"arguments": arguments}, timeout)
    return subprocess.CompletedProcess(arguments, code, out, err)


def refused(*arguments: str) -> str:
    """The one line of a run that must be refused."""
    ended = run(*arguments)
    assert ended.returncode == 2 and ended.stderr.startswith("error: "), ended
    assert all(line.startswith("qlora_ray ") for line in ended.stdout.splitlines() if line), ended.stdout
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    return ended.stderr


def train(configs: list[dict[str, Any]], timeout: float = 1500) -> None:
    """Train configs, one thread a worker.

    One that comes again goes on from its first checkpoint, as if it had crashed there; `whole` is what it was before.
    """
    _ask({"configs": configs}, timeout)


def whole(run: Path) -> Path:
    """Where a run lies as it was before it came again."""
    return run.with_name(f"{run.name}-whole")


def go_back(run: Path) -> None:
    """Leave of a run what a crash after its first checkpoint leaves; `whole` is what it was."""
    shutil.copytree(run, whole(run))
    for later in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)


class _Server:
    """The process that trains, and ends with the tests."""

    def __init__(self) -> None:
        self._log = os.fdopen(os.memfd_create("many_runs"), "w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.many_runs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env=ENVIRONMENT, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)

    def ask(self, request: dict[str, Any], timeout: float) -> Any:
        """The answer; a process that gives none in time, or is not waited for, is ended."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            in_time = select.select([self.process.stdout], [], [], timeout)[0]
            answer = self.process.stdout.readline() if in_time else ""
            assert answer, f"{'it ended' if in_time else f'no answer in {timeout} s'}: {self._last_words()}"
        except BaseException:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise
        return json.loads(answer)

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.communicate(timeout=100)


_servers: list[_Server] = []


def _ask(request: dict[str, Any], timeout: float) -> Any:
    if not _servers or _servers[-1].process.poll() is not None:
        _servers.append(_Server())
    return _servers[-1].ask(request, timeout)


# What follows is of the process that trains.

_teams: dict[int, Any] = {}  # by number of workers: a driver.fit.Fit that goes on


class Turn:
    """One run of a team that stays; to the driver it is what driver.fit.Fit is."""

    def __init__(self, team: Callable, config: Config, hardware: Hardware, *where: Any):
        """`team` makes one: driver.fit.Fit, before this took its place. `where` are folder, network and measures."""
        import ray

        check_workers_fit(config, resources_of_a_worker(config, uses_gpu(config, hardware)), hardware)
        size = config.ray.max_workers
        assert config.ray.min_workers == size and not config.ray.address
        if size not in _teams or not _teams[size].is_running():  # at first, and after an error
            alone = config.ray.model_copy(update={"resources_per_worker": {"CPU": 0.1}, "max_failures": 0})
            _teams[size] = team(config.model_copy(update={"ray": alone}), hardware, *where)
        self._config, self._team, self._size, self.channel = config, _teams[size], size, _teams[size].channel
        self.began = time.time()
        ray.get(self.channel.__ray_call__.remote(_begin))

    @property
    def error(self) -> BaseException | None:
        return self._team.error

    def is_running(self) -> bool:
        import ray

        return self._team.is_running() and ray.get(self.channel.__ray_call__.remote(_num_ended)) < self._size

    def measured(self) -> ModelFacts:
        return exact_facts(self._config)

    def call_off(self) -> None:
        """The workers wait for the next run."""


def _begin(channel: Any) -> None:
    number = getattr(channel, "number", 0)
    channel.__init__()
    channel.number, channel.num_ended = number + 1, 0


def _wanted(channel: Any) -> tuple[int, Run | None, bool]:
    return getattr(channel, "number", 0), *channel.wanted()


def _end(channel: Any) -> None:
    channel.num_ended += 1


def _num_ended(channel: Any) -> int:
    return channel.num_ended


def work(job: dict[str, Any]) -> None:
    """What each worker does, in place of qlora_ray.worker.train_worker."""
    import ray

    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    from qlora_ray.worker import losses

    losses.load()
    from qlora_ray.worker.loop import run_worker

    channel, last, began = job["channel"], 0, time.monotonic()
    while True:
        number, run, is_over = ray.get(channel.__ray_call__.remote(_wanted))
        if is_over:
            return
        if run is None or number == last:
            time.sleep(min(2.0, max(POLL_SECONDS, 0.02 * (time.monotonic() - began))))  # the longer idle, the lazier
            continue
        laps.begin()
        laps.note("imports", 0.0)
        run_worker(run, channel)
        ray.get(channel.__ray_call__.remote(_end))
        last, began = number, time.monotonic()


def _made(values: dict[str, Any], hardware: Hardware) -> Run:
    """The run of a config, ready for its workers."""
    config = make_config(values)
    folder, facts = storage.open_folder(config.ray.storage_path), exact_facts(config)
    data = prepare(config, folder, layout(config, facts))
    plan = make_plan(config, data.stats, facts, hardware, None)
    run = folder / str(config.ray.run_name)
    ground = directory.Ground(directory.run_identity(config, data.stats, facts, plan), {"versions": versions()}, {})
    directory.write_run_files(run, config, plan, data.stats, ground)
    return Run(config, plan, run, data.entry, data.stats.fingerprint, debug=False)


def _train(configs: list[dict[str, Any]], hardware: Hardware) -> None:
    """Raises what a worker raises."""
    import ray

    from qlora_ray.driver import fit

    trained = set()
    for values in configs:
        run = _made(values, hardware)
        if run.folder.path in trained:
            go_back(Path(run.folder.path))
        trained.add(run.folder.path)
        turn: Any = fit.Fit(run.config, hardware, run.folder, {})
        while turn.is_running():
            ray.get(turn.channel.take.remote(run))
            time.sleep(POLL_SECONDS)
        if turn.error:
            raise turn.error


def _open_door(arguments: list[str]) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr."""
    from qlora_ray import train

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = train.main(arguments)
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue(), err.getvalue()


def main() -> None:
    """Answer what stdin asks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries say
    from qlora_ray import worker
    from qlora_ray.cluster import connect
    from qlora_ray.door import shut_ray_down

    connect.set_environment(Config(), debug=False)
    hardware = connect.start_ray(Config(), debug=False)
    from qlora_ray.driver import fit

    connect.start_ray = lambda *_: hardware
    worker.train_worker = work
    fit.Fit = functools.partial(Turn, fit.Fit)  # type: ignore[misc, assignment]
    for line in sys.stdin:
        request = json.loads(line)
        done = _train(request["configs"], hardware) if "configs" in request else _open_door(request["arguments"])
        print(json.dumps(done), file=answers, flush=True)
    for team in _teams.values():
        team.call_off()
    shut_ray_down(debug=False)


if __name__ == "__main__":
    from tests.integration import many_runs  # its functions have a name there that the workers know

    many_runs.main()
