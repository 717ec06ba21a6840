"""A few records and a few steps: what everyone tries first works, and ends with the same bits whatever happens.

All runs share a Ray, and those of a number of workers their worker processes, which are what takes the time; each goes
through the product's own preparation, plan and worker.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_ray.config import Config, make_config
from tests.integration import door, many_runs, tiny_models


@dataclass(frozen=True)
class Case:
    """A run of `records` records and `steps` steps."""

    records: int
    stage: int
    has_validation: bool
    steps: int = 3
    base: str = "embedded"
    variant: str = "lora"
    expert_lora: bool = False
    batch_size: int = 2

    @property
    def name(self) -> str:
        validated = "validated" if self.has_validation else "alone"
        what = f"{Path(self.base).name}-{self.variant}-records{self.records}-stage{self.stage}"
        return f"{what}-{validated}-steps{self.steps}"


FEW = [
    Case(12, 3, True), Case(2, 3, True, steps=1), Case(1, 3, False), Case(3, 2, True), Case(5, 0, True),
    Case(5, 3, True, variant="dora"),
]  # fmt: skip
ALL = [
    Case(records, stage, has_validation)
    for records in (1, 2, 3, 5, 12, 30)
    for stage in (0, 2, 3)
    for has_validation in (True, False)
    if records > 1 or not has_validation  # one record cannot be held out
]


def config_of(case: Case, folder: Path, num_workers: int) -> Config:
    """Validation and a checkpoint at each step, dropout where PEFT has it; a global batch of 4 rows for any workers."""
    has_dropout = case.variant == "lora" and not case.expert_lora
    data = folder / f"{case.records}.json"
    data.write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i} it is"} for i in range(case.records)]))
    return make_config({
        "model": {"base_model": case.base, "lora_variant": case.variant,
                  "expert_lora": case.expert_lora, "lora_dropout": 0.1 if has_dropout else 0},
        "training": {"max_steps": case.steps, "batch_size": case.batch_size, "global_batch_size": 4, "max_length": 32,
                     "eval_every_steps": 1},
        "data": {"train_file": str(data), "validation_split": 0.1 if case.has_validation else 0},
        "deepspeed": {"zero_stage": case.stage}, "checkpoint": {"every_steps": 1, "keep": case.steps},
        "ray": {"num_workers": num_workers, "storage_path": str(folder / f"workers{num_workers}"),
                "run_name": case.name},
        "evaluation": {"num_prompts": 2, "max_new_tokens": 4, "num_samples": 1},
    })  # fmt: skip


def bits(run: Path, step: int) -> tuple[str, str]:
    newest = run / "checkpoints" / f"step_{step:08d}"
    return door.sha256(newest / "optimizer.safetensors"), door.sha256(run / "adapter" / "adapter_model.safetensors")


def check(cases: list[Case], folder: Path) -> None:
    """Train each case with one worker and with two, and again from its first checkpoint."""
    made = [(config_of(case, folder, num_workers)) for num_workers in (1, 2) for case in 2 * cases]
    many_runs.train([config.model_dump(mode="json") for config in made])
    for case in cases:
        again = [folder / f"workers{num_workers}" / case.name for num_workers in (1, 2)]
        runs = [*again, *map(many_runs.whole, again)]
        steps = list(range(1, case.steps + 1))
        losses = door.losses(runs[0])
        assert list(losses) == steps, case
        for run in runs:
            assert door.losses(run) == losses, run
            assert [line["step"] for line in door.metrics(run) if "eval_loss" in line] == steps * case.has_validation
            assert (run / "adapter_best").exists() == case.has_validation
            log = (run / "logs" / "worker_0.log").read_text()
            assert case.base != "embedded" or "fused: 4 decoder layers" in log, run
        assert len({bits(run, case.steps) for run in runs}) == 1, case


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
