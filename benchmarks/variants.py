"""One training step as the product takes it, and as peers do: each gives the step and its share of 4-bit weights."""

# B rows in a micro-batch, T tokens per row
import os

from benchmarks.bases import build_base
from benchmarks.shapes import LEARNING_RATE, RANK, SEED

MLP = ("gate_proj", "up_proj", "down_proj")


def ours(arguments, shape: dict):
    """The product's model; with stage0 or stage3 in its engine too, dora as DoRA, experts adapted."""
    import torch

    from qlora_ray.config import Config
    from qlora_ray.model.adapter import add_adapter, trainable
    from qlora_ray.model.fused import fuse, fused_layers, keep
    from qlora_ray.model.plain import keep_plain, plain_layers
    from qlora_ray.model.recompute import Choice, Keep
    from qlora_ray.model.stash import HostStash
    from qlora_ray.worker.loss import num_label_tokens, sum_of_nats

    variant = "dora" if "dora" in arguments.variant.split("_") else "lora"
    settings = {"lora_r": RANK, "lora_alpha": RANK, "lora_variant": variant}
    settings["expert_lora"] = "experts" in arguments.variant.split("_")
    config = Config.model_validate({"model": settings})
    model = add_adapter(build_base(shape, arguments.device), config.model, torch.bfloat16, SEED)
    print(fuse(model))
    share = four_bit_share(model)
    levels = [Keep[name.upper()] for name in arguments.keep if name != "weights"]
    num_layers, plain = len(fused_layers(model)), plain_layers(model)
    if plain and arguments.keep != ["all"]:
        model.enable_input_require_grads()
        stash = HostStash(torch.device(arguments.device)) if arguments.device == "cuda" else None
        keep_plain(plain, (levels * len(plain))[: len(plain)], stash)
    keep(model, Choice(tuple((levels * num_layers)[:num_layers]), num_layers * ("weights" in arguments.keep)))
    model.train()
    stage = next((part.removeprefix("stage") for part in arguments.variant.split("_") if "stage" in part), "")
    if not stage:
        return _step(lambda batch: sum_of_nats(model, batch) / num_label_tokens(batch), _backward, _adamw(model)), share
    num_trainable = sum(parameter.numel() for parameter in trainable(model).values())
    from qlora_ray.planning import deepspeed
    from qlora_ray.worker.engine import Engine

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29531 + os.getpid() % 1000), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    torch.distributed.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    settings = deepspeed.defaults(config, int(stage), 1, "bfloat16", num_trainable)
    engine = Engine(model, config.training, {**settings, "train_micro_batch_size_per_gpu": arguments.batch_size})
    engine.train()

    def backward(loss):
        engine.backward(loss)
        engine.add_up(1)

    def loss_of(batch):
        return sum_of_nats(engine, batch) / num_label_tokens(batch)

    return _step(loss_of, backward, lambda: engine.step(LEARNING_RATE)), share


def peft(arguments, shape: dict):
    """transformers + PEFT: `peft` as its documentation says, `peft_liger` with Liger kernels and 16-bit LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    base = build_base(shape, arguments.device)
    liger, recompute = arguments.variant.startswith("peft_liger"), arguments.keep != ["all"]
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(base)
    else:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=recompute)
    if recompute:
        base.gradient_checkpointing_enable({"use_reentrant": True})
        base.enable_input_require_grads()
    torch.manual_seed(SEED)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(base, lora, autocast_adapter_dtype=not liger)
    if liger:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    model.train()
    return _plain_step(model)


def unsloth(arguments, shape: dict):
    """Unsloth with its own loader and defaults."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        arguments.checkpoint, max_seq_length=arguments.length, load_in_4bit=True, dtype=None, local_files_only=True
    )
    import torch

    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    has_experts = "num_experts_per_tok" in shape
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", random_state=SEED,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *([] if has_experts else MLP)],
        use_gradient_checkpointing=False if arguments.keep == ["all"] else "unsloth",
    )  # fmt: skip
    model.train()
    return _plain_step(model)


def _plain_step(model):
    def loss_of(batch):
        return model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    return _step(loss_of, _backward, _adamw(model)), four_bit_share(model)


def _step(loss_of, backward, update):
    """A step and its laps: the loss of a batch, its gradient, new weights."""

    def step(batch, lap):
        loss = loss_of(batch)
        lap("forward")
        backward(loss)
        lap("backward")
        update()
        lap("step")
        return loss.detach()

    return step


def _backward(loss):
    loss.backward()


def four_bit_share(model) -> float:
    """Of a model's weights, how much is in 4 bits."""
    from qlora_ray.model.base import count_bytes

    stored = count_bytes(model)
    return stored.four_bit_parameters / stored.parameters


def _adamw(model):
    """Updates the weights, and begins their gradients anew."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    return update
