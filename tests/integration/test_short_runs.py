"""A few records and a few steps: what everyone tries first works, and ends with the same bits whatever happens.

All runs of a number of workers share their worker processes, which are what takes the time; each goes through the
product's own preparation, plan and worker.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora_ray.config import Config, make_config
from tests.integration import door, tiny_models


@dataclass(frozen=True)
class Case:
    """A run of `records` records and `steps` steps."""

    records: int
    stage: int
    has_validation: bool
    steps: int = 3
    base: str = "embedded"
    batch_size: int = 2

    @property
    def name(self) -> str:
        validated = "validated" if self.has_validation else "alone"
        return f"{Path(self.base).name}-records{self.records}-stage{self.stage}-{validated}-steps{self.steps}"


FEW = [
    Case(12, 3, True), Case(2, 3, True, steps=1), Case(1, 3, False), Case(3, 2, True), Case(5, 0, True)
]  # fmt: skip
ALL = [
    Case(records, stage, has_validation)
    for records in (1, 2, 3, 5, 12, 30)
    for stage in (0, 2, 3)
    for has_validation in (True, False)
    if records > 1 or not has_validation  # one record cannot be held out
]


def config_of(case: Case, folder: Path, num_workers: int, model: dict[str, Any] | None = None) -> Config:
    """Validation and a checkpoint at each step; the global batch is 4 rows for any number of workers.

    The model's settings are those given, or dropout.
    """
    data = folder / f"{case.records}.json"
    data.write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i} it is"} for i in range(case.records)]))
    return make_config({
        "model": {"base_model": case.base, **(model or {"lora_dropout": 0.1})},
        "training": {"max_steps": case.steps, "batch_size": case.batch_size, "global_batch_size": 4, "max_length": 32,
                     "eval_every_steps": 1},
        "data": {"train_file": str(data), "validation_split": 0.1 if case.has_validation else 0},
        "deepspeed": {"zero_stage": case.stage}, "checkpoint": {"every_steps": 1, "keep": case.steps},
        "ray": {"num_workers": num_workers, "storage_path": str(folder / f"workers{num_workers}"),
                "run_name": case.name},
        "evaluation": {"num_prompts": 2, "max_new_tokens": 4, "num_samples": 1},
    })  # fmt: skip


def train_all(cases: list[Case], folder: Path, num_workers: int, model: dict[str, Any] | None = None) -> None:
    """Train each case in its run directory, or go on with it."""
    configs = [config_of(case, folder, num_workers, model).model_dump(mode="json") for case in cases]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.integration.many_runs"], input=json.dumps(configs), text=True,
        capture_output=True, timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]


def bits(run: Path, step: int) -> list[str]:
    newest = run / "checkpoints" / f"step_{step:08d}"
    return [door.sha256(newest / "optimizer.safetensors"), door.sha256(run / "adapter" / "adapter_model.safetensors")]


def check(cases: list[Case], folder: Path) -> None:
    for num_workers in (1, 2):
        train_all(cases, folder, num_workers)
    ended = {}
    for case in cases:
        one, two = (folder / f"workers{num_workers}" / case.name for num_workers in (1, 2))
        steps = list(range(1, case.steps + 1))
        assert list(door.losses(one)) == steps, case
        assert door.losses(one) == door.losses(two), case
        assert [line["step"] for line in door.metrics(one) if "eval_loss" in line] == steps * case.has_validation
        assert (one / "adapter_best").exists() == case.has_validation
        ended[case] = bits(one, case.steps)
        assert bits(two, case.steps) == ended[case], case
        for run in (one, two):
            for step in steps[1:]:
                shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    for num_workers in (1, 2):
        train_all(cases, folder, num_workers)
    for case in cases:
        for num_workers in (1, 2):
            assert bits(folder / f"workers{num_workers}" / case.name, case.steps) == ended[case], (case, num_workers)


@pytest.mark.timeout(900)
def test_run_of_a_few_records_ends_with_the_same_bits_for_any_workers_and_after_a_resume(tmp_path):
    check(FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_in_4_bits_end_with_the_same_bits_for_any_workers_and_after_a_resume(tmp_path):
    bases = [tiny_models.save(family, tmp_path / family) for family in ("qwen2_moe", "gpt_oss")]
    cases = [Case(5, stage, True, base=base) for base in bases for stage in (0, 3)]
    check(cases, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_base_with_dropout_of_its_own_ends_with_the_same_bits_for_any_workers_and_after_a_resume(tmp_path):
    base = tiny_models.save("gpt2", tmp_path / "gpt2")  # 0.1 of embeddings, attention and what layers add
    check([Case(5, stage, True, base=base) for stage in (0, 3)], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_small_number_of_records_stage_and_validation_trains_and_resumes(tmp_path):
    check(ALL, tmp_path)
