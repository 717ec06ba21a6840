"""A file of prompts answered by many workers through Ray Data: in order, resumable, bad rows reported in their place.

While it goes on, answers are in <output>.partial, and what they were made with in <output>.partial.json. Prompts are
cut into batches of fixed content, and only whole batches count, so where a run was killed does not change its answers.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_ray.config import Config
from qlora_ray.data.formats import to_question
from qlora_ray.data.turns import Messages
from qlora_ray.errors import BadRecord, ConfigError, WorkersFailed
from qlora_ray.model.record import Adapter

MAX_BATCHES_PER_TASK = 4  # answers are written, and safe, when a task is done


@dataclass(frozen=True)
class Job:
    """How to answer; a worker gets it whole."""

    adapter: Adapter
    options: dict[str, Any]
    batch_size: int
    compare: bool
    seed: int
    opening: Messages  # what may be called, and a system message: of each row that has none of its own

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption."""
        return {
            "adapter": self.adapter.sha256(),
            "options": self.options,
            "batch_size": self.batch_size,
            "compare": self.compare,
            "seed": self.seed,
            "opening": self.opening,
        }


def answer_file(job: Job, source: str, target: str, workers: int | None, address: str | None) -> int:
    """Answer every line of `source` into `target`; returns the exit code. Raises ConfigError."""
    from qlora_ray.inference.load import open_tokenizer

    lines = _read_lines(source)
    output = Path(target)
    partial, identity_file = Path(f"{target}.partial"), Path(f"{target}.partial.json")
    if output.exists():
        raise ConfigError(f"--output {target}: is there already. Delete it, or name another file.")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {target}: no folder {output.parent}.")
    open_tokenizer(job.adapter)  # what does not fit is said here, not by a worker
    identity = {"input": hashlib.sha256("\n".join(lines).encode()).hexdigest(), **job.identity()}
    num_done = _resume(partial, identity_file, identity, job.batch_size)
    if num_done:
        print(f"{num_done:,} of {len(lines):,} rows are answered already.", file=sys.stderr)
    batches = [lines[start : start + job.batch_size] for start in range(num_done, len(lines), job.batch_size)]
    try:
        with partial.open("a", encoding="utf-8") as file:
            for texts in _answers(job, batches, num_done // job.batch_size, workers, address):
                file.write("".join(text + "\n" for text in texts))
                file.flush()
                os.fsync(file.fileno())
    except WorkersFailed as error:
        print(f"error: the workers failed: {error} What is answered stays in {partial}; the same command goes on.",
              file=sys.stderr)  # fmt: skip
        return 1
    bad = _count_bad(partial)
    partial.replace(output)
    identity_file.unlink()
    print(f"{len(lines):,} rows in {target}" + (f"; {len(bad):,} could not be answered: {bad[0]}" if bad else ""),
          file=sys.stderr)  # fmt: skip
    return 0


def to_prompt(line: str, opening: Messages) -> tuple[Any, Messages]:
    """A line of the input as (record, messages up to where the assistant is to speak). Raises BadRecord."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    asked = to_question(record)
    has = {turn["role"] for turn in asked}
    tools = [turn for turn in [*opening, *asked] if turn["role"] == "tools"][-1:]  # the row's own before the job's
    system = [turn for turn in opening if turn["role"] == "system" and "system" not in has]
    return record, [*tools, *system, *(turn for turn in asked if turn["role"] != "tools")]


class Answerer:
    """What a Ray Data worker holds: the loaded adapter."""

    def __init__(self, job: Job):
        from qlora_ray.inference.load import load, pick_device

        self._job, self._loaded = job, load(job.adapter, pick_device())

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        """Answer the batches of a task: columns `number` and `lines` (JSON) in, `number` and `texts` (JSON) out."""
        texts = [
            json.dumps(self._answer(int(number), json.loads(lines)))
            for number, lines in zip(batch["number"], batch["lines"], strict=True)
        ]
        return {"number": batch["number"], "texts": texts}

    def _answer(self, number: int, lines: list[str]) -> list[str]:
        from qlora_ray.errors import TooLong
        from qlora_ray.inference.load import fit_prompt, room

        first, rows, prompts = number * self._job.batch_size, [], []
        for row, line in enumerate(lines, first):
            try:
                record, messages = to_prompt(line, self._job.opening)
                ids = fit_prompt(self._loaded, messages, self._job.options)
                rows.append({"row": row, "input": record})
                prompts.append((len(rows) - 1, ids))
            except (BadRecord, TooLong) as error:
                rows.append({"row": row, "error": str(error)})
        if prompts:
            longest = max((ids for _, ids in prompts), key=len)
            options = room(self._loaded, longest, self._job.options)
            if self._job.compare:
                with self._loaded.model.disable_adapter():
                    self._fill(rows, prompts, options, number, "base")
            self._fill(rows, prompts, options, number, "answer")
        return [json.dumps(row, ensure_ascii=False) for row in rows]

    def _fill(self, rows: list[dict], prompts: list, options: dict, number: int, name: str) -> None:
        import torch

        from qlora_ray.model.answer import answer_texts

        torch.manual_seed(self._job.seed * 1_000_003 + number)  # of its place alone, whoever answers it
        loaded = self._loaded
        texts = answer_texts(loaded.model, [ids for _, ids in prompts], loaded.tokenizer, loaded.device, **options)
        for (place, _), text in zip(prompts, texts, strict=True):
            rows[place][name] = text


def _answers(
    job: Job, batches: list[list[str]], first: int, workers: int | None, address: str | None
) -> Iterator[list[str]]:
    """The output lines of each batch, in order."""
    if not batches:
        return
    import logging

    # "has constructor arguments in the object store": Ray Data's own way of starting its workers.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray.data
    import ray.exceptions

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs each error that it also raises
    from qlora_ray.cluster.connect import set_environment, start_ray

    config = Config.model_validate({"ray": {"num_workers": workers or 1, "address": address}})
    set_environment(config, debug=False)
    hardware = start_ray(config, debug=False)
    try:
        num_gpus = int(hardware.num_gpus)
        workers = workers or max(1, num_gpus)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        items = [{"number": first + i, "lines": json.dumps(lines)} for i, lines in enumerate(batches)]
        num_tasks = max(-(-len(items) // MAX_BATCHES_PER_TASK), min(len(items), workers))
        task: Any = Answerer
        answered = ray.data.from_items(items, override_num_blocks=num_tasks).map_batches(
            task, fn_constructor_args=(job,), batch_size=None, batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(workers, num_tasks)), num_cpus=1, num_gpus=1 if num_gpus else 0,
        )  # fmt: skip
        number = first
        for row in answered.iter_rows():
            assert row["number"] == number, "Ray Data gave the batches in another order"
            number += 1
            yield json.loads(row["texts"])
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        reason = str(cause).strip().splitlines()[-1]
        raise WorkersFailed(reason.removeprefix("qlora_ray.errors.ConfigError: ")) from error
    finally:
        ray.shutdown()


def _read_lines(source: str) -> list[str]:
    key = f"--input {source}"
    try:
        text = Path(source).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{key}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{key}: not UTF-8 at line {line}. Convert it, e.g. with iconv.") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"{key}: holds no row.")
    if lines[0].lstrip().startswith("["):
        raise ConfigError(f"{key}: begins with '[': one JSON object a line is needed, not a JSON array.")
    return lines


def _resume(partial: Path, identity_file: Path, identity: dict[str, Any], batch_size: int) -> int:
    """Rows of whole batches that are written already; cuts off what follows them. Raises ConfigError."""
    if not partial.exists() or not identity_file.exists():
        identity_file.write_text(json.dumps(identity, indent=1), "utf-8")
        partial.write_bytes(b"")
        return 0
    before = json.loads(identity_file.read_text("utf-8"))
    changed = [name for name, value in identity.items() if before.get(name) != value]
    if changed:
        raise ConfigError(
            f"{partial}: was begun with another {', '.join(changed)}. Ask for the same again, or delete it."
        )
    whole = partial.read_bytes().split(b"\n")[:-1]
    kept = whole[: len(whole) // batch_size * batch_size]
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    return len(kept)


def _count_bad(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text("utf-8").split("\n")[:-1])
    return [f"row {row['row']}: {row['error']}" for row in rows if "error" in row]
