"""From a config to a run: what is refused is refused, data is prepared while Ray starts, then the plan is made."""

import importlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from qlora_ray import __version__, collector, laps, storage
from qlora_ray.cluster import connect
from qlora_ray.config import Config
from qlora_ray.console import console, say_note
from qlora_ray.data.check import check_records
from qlora_ray.data.prepare import Prepared, prepare
from qlora_ray.driver import screen
from qlora_ray.errors import ConfigError
from qlora_ray.model.facts import ModelFacts, read_facts
from qlora_ray.model.hub import folder_at_hand
from qlora_ray.model.start import copy_weights, open_start
from qlora_ray.model.start import notes as start_notes
from qlora_ray.planning import offload
from qlora_ray.planning.early import (
    as_stored,
    check_room,
    exact_facts,
    local_base,
    read_deepspeed_json,
    refuse_before_ray,
)
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import Plan, make_plan, storage_bytes
from qlora_ray.planning.rows import layout
from qlora_ray.planning.tokens import check_vocabulary
from qlora_ray.rundir import directory, names
from qlora_ray.storage import Folder

if TYPE_CHECKING:
    from qlora_ray.driver.fit import Fit

EXIT_CODES = {"done": 0, "interrupted": 130, "refused": 2}


@dataclass(frozen=True)
class Ready:
    """What is there when the plan is made."""

    facts: ModelFacts
    data: Prepared
    hardware: Hardware
    notes: list[str]  # of the nodes, and of the data's tokens
    network: dict[str, str]  # what tells the workers which interface to use, as environment variables
    fit: "Fit | None"  # where workers start already


@dataclass(frozen=True)
class Start:
    """A run that is asked for."""

    config: Config
    config_name: str  # of the file, without ending
    resume: bool
    debug: bool
    began: float  # time.perf_counter() of the command

    def train(self) -> int:
        """Train to the end of the run; returns the exit code. Raises ConfigError for what can be refused before."""
        config = offload.taken_from_json(self.config, read_deepspeed_json(self.config))
        return replace(self, config=config)._train()

    def _train(self) -> int:
        config = self.config
        laps.begin()
        refuse_before_ray(config)
        folder = storage.open_folder(config.ray.storage_path)
        storage.check_writable(folder)
        if config.model.cache_quantized is True and not folder.is_local:
            raise ConfigError(
                f"model.cache_quantized=true: ray.storage_path={config.ray.storage_path} is no folder, and 4-bit "
                "weights are read from one. Use auto, or a folder that all nodes share."
            )
        run = directory.find_run(config, self.config_name, folder, self.resume)
        check_records(config)
        console.print(f"qlora_ray {__version__}: starting Ray and the workers for {escape(run.path)} ...\n")
        connect.set_environment(config, self.debug)
        with ExitStack() as unless_trained:
            ready = self._prepare(folder, run, unless_trained)
            config = as_stored(config)  # its base is here now
            plan = make_plan(config, ready.data.stats, ready.facts, ready.hardware, read_deepspeed_json(config))
            if plan.passing and not connect.address(config):
                check_room(config, plan.passing)
            if not replace(self, config=config)._open(run, plan, ready):
                return 0
            unless_trained.pop_all()
        from qlora_ray.driver.run import Driver
        from qlora_ray.worker.messages import Run

        entry, fingerprint = ready.data.entry, ready.data.stats.fingerprint
        what = Run(config, plan, run, entry, fingerprint, self.debug)
        summary = Driver(what, self.began).listen(ready.fit or self._begin(ready.hardware, run, ready.network))
        screen.show_result(summary, run)
        return EXIT_CODES.get(summary["status"], 1)

    def _begin(self, hardware: Hardware, run: Folder, network: dict[str, str], measures: bool = False) -> "Fit":
        from qlora_ray.driver.fit import Fit

        return Fit(self.config, hardware, run, network, measures)

    def _prepare(self, folder: Folder, run: Folder, unless_trained: ExitStack) -> Ready:
        """Prepare the data while Ray starts, and on this machine's own Ray also the workers, called off on the way out.

        Ray must start on this thread: its processes die with their maker. Workers that start early measure the base,
        for which they import nothing that they do not need anyway; else this process does.
        """
        from qlora_ray.cluster.quick import ask_quickly, look_quickly

        config, started = self.config, Future[Hardware]()
        at_hand = folder_at_hand(config.model.base_model, config.model.revision) is not None
        starts_early = at_hand and not connect.address(config)  # of a cluster nothing is taken before all is planned
        with ThreadPoolExecutor(1) as thread:
            thread.submit(importlib.import_module, "ray.train")  # takes a second, and fit waits for it
            measured = None if starts_early else thread.submit(_measure, config)
            prepared = thread.submit(_prepare_data, config, folder, started, measured)
            try:
                with laps.part("Ray"), collector.paused():
                    hardware = connect.start_ray(config, self.debug)
                fit = None
                if starts_early:
                    fit = self._begin(hardware, run, {}, measures=True)
                    unless_trained.callback(fit.call_off)
                with laps.part("look at the nodes"):
                    found = ask_quickly(config, folder, hardware)
                facts = fit.measured() if fit else None
                if measured and at_hand:  # else it is still downloaded
                    facts = measured.result()
                notes, network, hardware = look_quickly(found, config, hardware, facts)
                started.set_result(hardware)
            except BaseException as error:
                started.set_exception(error)  # the thread may be waiting for it
                raise
            data = prepared.result()
            facts = measured.result() if measured else facts
        assert facts is not None
        return Ready(facts, data, hardware, [*notes, *check_vocabulary(config, data, facts)], network, fit)

    def _open(self, run: Folder, plan: Plan, ready: Ready) -> bool:
        """Say what will be done, and write it into the run directory; False where all of it is done already.

        Raises ConfigError for what cannot be resumed.
        """
        from qlora_ray.cluster.node_facts import versions
        from qlora_ray.driver import resume

        config, data = self.config, ready.data
        start = open_start(config.model)
        lineage = start.lineage() if start else None
        identity = directory.run_identity(config, data.stats, ready.facts, plan, lineage)
        hardware = {"use_gpu": plan.use_gpu, "accelerators": list(ready.hardware.accelerator_types)}
        before = directory.check_resumable(run, identity, self.resume)
        found = resume.look(run, config, plan) if self.resume else None
        if found and found.is_complete:
            screen.show_done_before(found.state.step, run)
            return False
        changed = [resume.record(found)] if found and found.changes else []
        around: dict[str, dict[str, Any]] = {"versions": versions(), "hardware": hardware}
        ground = directory.Ground(identity, around, before, changed, lineage)
        storage.check_space(run, storage_bytes(config, plan.num_trainable_parameters))
        screen.show_plan(plan, config, data.stats, ready.facts, run)
        for note in [
            *ready.notes, *(start_notes(start, config) if start else []), *directory.differences(ground),
            *(resume.notes(found, config, plan) if found else []),
        ]:  # fmt: skip
            say_note(note)
        if start:
            copy_weights(start, run / names.START_FROM)
        directory.write_run_files(run, config, plan, data.stats, ground)
        directory.write_rejected(run, data)
        return True


def _measure(config: Config) -> ModelFacts:
    with laps.part("sizes of the base"):
        return exact_facts(config)


def _prepare_data(
    config: Config, folder: Folder, started: Future[Hardware], measured: Future[ModelFacts] | None
) -> Prepared:
    """Tokenized rows. Long work waits until all that can be refused before has been; a cluster does it, if there is."""
    from qlora_ray.data.spread import run_on_cores, run_on_ray

    def runner():
        started.result()
        return run_on_ray if connect.address(config) else run_on_cores

    facts = measured.result() if measured else read_facts(local_base(config))
    with laps.part("data"):
        return prepare(config, folder, layout(config, facts), runner, console.out)
