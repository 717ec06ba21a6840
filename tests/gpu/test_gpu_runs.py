"""Whole runs on a GPU: NCCL, CUDA's NF4 kernels, mixed precision, offload."""

import json

import pytest

from qlora_ray import evaluate, export
from tests.integration import door

pytestmark = pytest.mark.gpu


def run(tmp_path, name, *more):
    ended = door.run(
        "-c", "configs/quickstart.yaml", f"ray.storage_path={tmp_path}", f"ray.run_name={name}", "ray.num_workers=1",
        "training.batch_size=16", "training.max_steps=40", "training.eval_every_steps=20", "logging.every_steps=1",
        "checkpoint.every_steps=10", "checkpoint.keep=9", *more,
    )  # fmt: skip
    log = tmp_path / name / "logs" / "worker_0.log"
    assert ended.returncode == 0, ended.stderr + (log.read_text()[-3000:] if log.exists() else "")
    return tmp_path / name


@pytest.mark.parametrize(
    "name, settings",
    {
        "stage3_bfloat16": [],
        "stage0_bfloat16": ["deepspeed.zero_stage=0"],
        "stage2_bfloat16": ["deepspeed.zero_stage=2"],
        "stage3_float16": ["quantization.compute_dtype=float16"],
        "stage3_float32": ["quantization.compute_dtype=float32"],
        "offload_params_cpu": ["deepspeed.offload_params=cpu"],
        "offload_optimizer_cpu": ["deepspeed.offload_optimizer=cpu"],
        "no_recomputation": ["training.recompute=none"],
        "fused": ["model.lora_dropout=0"],
        "fused_float16": ["model.lora_dropout=0", "quantization.compute_dtype=float16"],
        "fused_leanest": ["model.lora_dropout=0", "training.recompute=all"],
        "fused_stage0": ["model.lora_dropout=0", "deepspeed.zero_stage=0"],
        "dora": ["model.lora_dropout=0", "model.lora_variant=dora"],
        "fused_offload_cpu": ["model.lora_dropout=0", "deepspeed.offload_params=cpu"],
        "deepspeed_json": ["--deepspeed", "configs/deepspeed_config.json"],
    }.items(),
)
def test_gpu_run_learns_the_skill(tmp_path, name, settings):
    summary = door.summary(run(tmp_path, name, *settings))
    assert summary["exact_match_base"] < 0.1
    assert summary["exact_match_adapter"] > 0.9
    assert summary["last_loss"] < 0.1 * summary["first_loss"]


def test_gpu_losses_are_those_of_stage_0(tmp_path):
    sharded = door.losses(run(tmp_path, "sharded", "quantization.compute_dtype=float32", "model.lora_dropout=0"))
    whole = door.losses(
        run(tmp_path, "whole", "quantization.compute_dtype=float32", "model.lora_dropout=0", "deepspeed.zero_stage=0")
    )
    first = range(1, 11)  # AdamW multiplies rounding from step to step: later ones say less
    assert [sharded[k] for k in first] == pytest.approx([whole[k] for k in first], rel=2e-3)


def test_gpu_is_used_and_its_memory_is_reported(tmp_path):
    path = run(tmp_path, "memory")
    (*_, last) = (line for line in door.metrics(path) if "peak_memory_gib" in line)
    assert 0 < last["peak_memory_gib"] < 8
    assert {"data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"} <= last.keys()
    assert '"use_gpu": true' in (path / "plan.json").read_text()


def test_gpu_adapter_is_reproduced_by_evaluate_and_merged_with_proof(tmp_path):
    path = run(tmp_path, "use", "evaluation.num_prompts=32")
    results = tmp_path / "results.json"
    assert evaluate.main(["--adapter", str(path / "adapter"), "--output", str(results)]) == 0
    found, summary = json.loads(results.read_text()), door.summary(path)
    assert found["with_adapter"]["exact_match"] == pytest.approx(summary["exact_match_adapter"], abs=1 / 32)
    arguments = ["--adapter", str(path / "adapter"), "--to", "merged", "--output", str(tmp_path / "merged")]
    assert export.main([*arguments, "--verify"]) == 0
