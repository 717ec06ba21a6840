"""The control of benchmarks.chaos: Ray Train + DeepSpeed ZeRO-3 + PEFT + bitsandbytes as their documentation shows.

    python -m benchmarks.stock_train STORAGE_PATH NAME NUM_STEPS

Checkpoints by `engine.save_checkpoint` and `ray.train.report`, restored by `ray.train.get_checkpoint`; the same command
goes on with a run of the same name. Writes <STORAGE_PATH>/<NAME>.steps.jsonl, and at the end .sha256 of the weights.
"""

import hashlib
import json
import os
import sys
import tempfile
import time

EVERY_STEPS, ROWS, LENGTH = 5, 4, 96


def train(job: dict) -> None:
    """One Ray Train worker."""
    import deepspeed
    import ray.train
    import torch
    from deepspeed.utils import safe_get_full_fp32_param
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 25 s of compilation, on a CPU only
    torch.manual_seed(0)
    rank, size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(job["base"], quantization_config=four_bit, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": 3},
                "zero_allow_untested_optimizer": True}  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3), config=settings)
    engine.train()  # left in eval mode, bitsandbytes repacks the weights of CPUs with AVX512-BF16, and saving fails
    step, checkpoint = 0, ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder, load_module_strict=False)
            step = state["step"]
    while step < job["num_steps"]:
        ids = torch.randint(3, 2048, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step * size + rank))
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        step += 1
        if rank == 0:
            with open(job["steps"], "a") as file:
                file.write(json.dumps({"step": step, "loss": float(loss), "time": time.time()}) + "\n")
        if step % EVERY_STEPS == 0:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder, client_state={"step": step}, exclude_frozen_parameters=True)
                ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
    digest = hashlib.sha256(b"".join(safe_get_full_fp32_param(one).numpy().tobytes() for one in trained)).hexdigest()
    if rank == 0:
        with open(job["sha256"], "w") as file:
            file.write(digest)


def main() -> None:
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1"}
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from qlora_ray.config import base_model_path

    storage, name, num_steps = os.path.abspath(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ray.init(num_cpus=3, include_dashboard=False)
    job = {"base": base_model_path("embedded"), "num_steps": num_steps, "steps": f"{storage}/{name}.steps.jsonl",
           "sha256": f"{storage}/{name}.sha256"}  # fmt: skip
    TorchTrainer(
        train,
        train_loop_config=job,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name=name, storage_path=storage, failure_config=FailureConfig(max_failures=5)),
    ).fit()


if __name__ == "__main__":
    main()
