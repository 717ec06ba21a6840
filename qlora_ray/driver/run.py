"""Runs Ray Train, listens to its workers, and closes the run directory whatever happens."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from qlora_ray import laps
from qlora_ray.cluster import connect
from qlora_ray.console import chatter_goes_to
from qlora_ray.driver.fit import Fit
from qlora_ray.driver.screen import Progress
from qlora_ray.driver.trackers import Trackers
from qlora_ray.rundir import names
from qlora_ray.storage import FREE_SPACE, unless_full
from qlora_ray.worker.messages import (
    Done,
    Evaluated,
    Failed,
    Fatal,
    Interrupted,
    Logged,
    Message,
    Ready,
    Referring,
    Refused,
    Run,
    Stepped,
    Warned,
)

STOP_TIMEOUT_SECONDS = 300
POLL_SECONDS = 0.2


class Driver:
    """One run, from ready data to a closed run directory."""

    def __init__(self, run: Run, began: float):
        """`began` is the time.perf_counter() of the command."""
        self._run, self._folder, self._began = run, run.folder, began
        self._seconds: dict[str, float] = {"prepare": time.perf_counter() - began}
        self._fit_began = 0.0  # time.time()
        self._done: Done | None = None
        self._refusal: str | None = None
        self._failures: list[dict[str, Any]] = []  # survived, or the last one
        self._interruptions: list[dict[str, Any]] = []  # announced: another number of workers, a node taken away
        self._fatal: str | None = None
        self._last_step = 0
        self._samples = ""  # lines of samples_by_step.jsonl that are still to be written
        self._trackers = Trackers(
            run.config.logging.trackers,
            run.folder.path if run.folder.is_local else f"{run.folder.name}-trackers",
            run.config.model_dump(mode="json"),
        )

    def listen(self, fit: Fit) -> dict[str, Any]:
        """Train to the end, to Ctrl-C or to failure; write summary.json and report.html; return the summary."""
        self._fit_began = fit.began
        with self._quiet():
            return self._fit(fit)

    def _fit(self, fit: Fit) -> dict[str, Any]:
        import ray

        with Progress(self._run.plan) as progress:
            try:
                while fit.is_running() and not (dead := connect.dead_processes()):
                    self._listen(self._news(fit, 60), progress)
                    time.sleep(POLL_SECONDS)
                if fit.is_running():
                    self._fatal = f"Ray on this machine has lost its {' and '.join(dead)}."
            except KeyboardInterrupt:
                progress.say("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")
                self._stop(fit, progress)
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                self._listen(self._news(fit, 10), progress)
            self._trackers.close()
            self._say_what_failed(progress)
        summary = self._summary(fit)
        problem = unless_full(lambda: self._close(summary), "what closes the run", self._folder)
        if problem and summary["status"] != "failed":
            summary |= {"status": "failed", "reason": f"{problem}. {FREE_SPACE}"}
        return summary

    def _close(self, summary: dict[str, Any]) -> None:
        from qlora_ray import report

        self._write_samples()
        if self._done and self._done.answers:
            samples = json.dumps(self._done.answers["samples"], ensure_ascii=False)
            (self._folder / names.SAMPLES).write_bytes(samples.encode())
            self._finish_cards()
        if self._done and self._done.pairs:
            (self._folder / names.PAIRS).write_bytes(json.dumps(self._done.pairs, ensure_ascii=False).encode())
        (self._folder / names.SUMMARY).write_bytes(json.dumps(summary, indent=1, ensure_ascii=False).encode())
        if self._folder.is_local and (self._folder / names.METRICS).exists():
            report.write_report(Path(self._folder.path))

    def _quiet(self) -> contextlib.AbstractContextManager:
        if self._run.debug:
            return contextlib.nullcontext()
        local = self._folder.is_local
        return chatter_goes_to(f"{(self._folder / names.LOGS).make().path}/driver.log" if local else os.devnull)

    def _listen(self, messages: list[Message], progress: Progress) -> None:
        for message in messages:
            match message:
                case Ready():
                    self._is_ready(message, progress)
                case Referring(split, done, total):
                    progress.show_reference(split, done, total)
                case Stepped(step):
                    self._has_stepped(step)
                case Failed(cause):
                    self._note(self._failures, cause)
                    if not (self._fatal or self._refusal):  # else the run ends, for the reason that was told
                        progress.note(f"{cause} after step {self._last_step:,}: going back to the last checkpoint")
                case Interrupted(cause):
                    self._note(self._interruptions, cause)
                    progress.note(f"{cause}: saving after step {self._last_step:,}")
                case Warned(text):
                    progress.note(text)
                case Fatal(reason):
                    self._fatal = self._fatal or reason
                case Logged(entry):
                    self._has_stepped(entry["step"])
                    progress.show(entry)
                    self._track(entry, progress)
                case Evaluated(step, metrics, samples):
                    self._keep_samples(step, samples, progress)
                    progress.say_evaluation(step, metrics)
                    self._track({"step": step, **metrics}, progress)
                case Refused(reason):
                    self._refusal = reason
                case Done():
                    self._done = message

    def _is_ready(self, message: Ready, progress: Progress) -> None:
        for event in (*self._failures[-1:], *self._interruptions[-1:]):
            if "resumed_from" not in event:
                event |= {
                    "resumed_from": message.step,
                    "steps_redone": max(0, self._last_step - message.step),
                    "seconds_to_recover": round(time.perf_counter() - event["at"], 2),
                }
        for reason in message.broken:
            progress.note(f"{reason} Going on from step {message.step:,}.")
        if "to_first_step" not in self._seconds:
            self._seconds["to_first_step"] = time.perf_counter() - self._began
            before = ("imports", "sizes of the base")  # the run was known
            self._seconds["load"] = sum(value for name, value in message.parts.items() if name not in before)
            laps.note("workers", max(0.0, message.began - self._fit_began))
            for name, seconds in message.parts.items():
                laps.note(name, seconds)

    def _has_stepped(self, step: int) -> None:
        self._last_step = step
        if "first_step_done" not in self._seconds:
            self._seconds["first_step_done"] = time.perf_counter() - self._began
            laps.note("first step", self._seconds["first_step_done"] - self._seconds["to_first_step"])

    def _note(self, events: list[dict[str, Any]], cause: str) -> None:
        events.append({"step": self._last_step, "cause": cause, "at": time.perf_counter()})

    def _track(self, entry: dict[str, Any], progress: Progress) -> None:
        self._trackers.log(entry)
        self._say_what_failed(progress)

    def _say_what_failed(self, progress: Progress) -> None:
        for failure in self._trackers.take_failures():
            progress.say(failure)

    def _keep_samples(self, step: int, samples: list[dict[str, Any]], progress: Progress) -> None:
        """Add answers from the middle of training to samples_by_step.jsonl; of a step done again, the last count."""
        self._samples += "".join(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
        if problem := unless_full(self._write_samples, names.SAMPLES_BY_STEP, self._folder):
            progress.note(f"{problem}. Its lines wait for space.")

    def _write_samples(self) -> None:
        if self._samples:
            path = self._folder / names.SAMPLES_BY_STEP
            path.write_bytes((path.read_bytes() if path.exists() else b"") + self._samples.encode())
            self._samples = ""

    def _news(self, fit: Fit, seconds: float) -> list[Message]:
        import ray

        return ray.get(fit.channel.take.remote(self._run), timeout=seconds)

    def _stop(self, fit: Fit, progress: Progress) -> None:
        import ray

        ray.get(fit.channel.stop.remote(), timeout=60)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        with contextlib.suppress(KeyboardInterrupt):
            while fit.is_running() and time.monotonic() < deadline:
                self._listen(self._news(fit, 60), progress)
                time.sleep(POLL_SECONDS)

    def _finish_cards(self) -> None:
        """Add what is known only at the end, the exact match, to record and card of the final adapter."""
        from qlora_ray.model import card
        from qlora_ray.model.record import FILE

        assert self._done is not None
        folder = self._folder / names.ADAPTER
        record = json.loads((folder / FILE).read_bytes())
        record["metrics"] |= {name: value for name, value in self._done.answers.items() if name != "samples"}
        (folder / FILE).write_bytes(json.dumps(record, indent=1).encode())
        (folder / "README.md").write_bytes(card.render(record).encode())

    def _summary(self, fit: Fit) -> dict[str, Any]:
        done = self._done
        ended = "interrupted" if fit.is_running() and not self._fatal else "failed"
        status = "refused" if self._refusal else done.status if done else ended
        self._seconds["total"] = time.perf_counter() - self._began
        survived = {
            name: [{key: value for key, value in event.items() if key != "at"} for event in events]
            for name, events in (("failures", self._failures), ("interruptions", self._interruptions))
        }
        reached: dict[str, Any] = {}
        if done:
            answers = {name: value for name, value in done.answers.items() if name != "samples"}
            reached = {"early": done.early, **done.state, **answers}
        return {
            "status": status,
            "reason": self._refusal or self._fatal or (str(fit.error) if fit.error else None),
            "steps": reached.pop("step", self._last_step),
            "planned_steps": self._run.plan.num_steps,
            **reached,
            "seconds": {**{name: round(value, 2) for name, value in self._seconds.items()}, "of_start": laps.taken()},
            **survived,
            "adapter": f"{self._folder.path}/{names.ADAPTER}" if done else None,
        }
