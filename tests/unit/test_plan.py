"""What is derived from config, data, base and hardware, against formulas and libraries of others."""

import dataclasses
import math
from pathlib import Path

import pytest

from qlora_ray.config import Config, base_model_path
from qlora_ray.data.stats import DataStats, Layout
from qlora_ray.errors import ConfigError
from qlora_ray.planning import holding, memory, table
from qlora_ray.planning.early import exact_facts, refuse_early
from qlora_ray.planning.hardware import Hardware, check_workers_fit, most_workers
from qlora_ray.planning.plan import learning_rate_at, make_plan
from qlora_ray.planning.rows import layout

TINY = base_model_path("embedded")
FACTS = exact_facts(Config())
DEEP = dataclasses.replace(  # the same with 16 times the layers, which sharing them makes less of
    FACTS, num_layers=16 * FACTS.num_layers, num_parameters=FACTS.num_parameters + 15 * FACTS.num_linear_parameters,
    num_linear_parameters=16 * FACTS.num_linear_parameters,
)  # fmt: skip
CPUS, GPUS = Hardware(8, 0), Hardware(64, 8, ("H100",))
DATA = DataStats(
    "key", 100, 0, 0, num_rows=90, num_validation_rows=10, num_tokens=900, num_label_tokens=400, longest_row=50
)


def config(**sections) -> Config:
    return Config.model_validate(sections)


def plan(hardware=CPUS, deepspeed_json=None, facts=FACTS, **sections):
    return make_plan(config(**sections), DATA, facts, hardware, deepspeed_json)


def refusal(hardware=CPUS, deepspeed_json=None, **sections) -> str:
    with pytest.raises(ConfigError) as refused:
        plan(hardware, deepspeed_json, **sections)
    return str(refused.value)


@pytest.mark.parametrize(
    ("workers", "batch", "accumulation", "epochs", "global_batch", "steps"),
    [(1, 4, 1, 3, 4, 69), (2, 4, 3, 1, 24, 4), (4, 1, 1, 0.5, 4, 12), (3, 30, 1, 2, 90, 2), (1, 64, 2, 0.01, 128, 1)],
)
def test_steps_are_epochs_times_full_or_short_batches(workers, batch, accumulation, epochs, global_batch, steps):
    made = plan(
        ray={"num_workers": workers},
        training={"batch_size": batch, "gradient_accumulation_steps": accumulation, "num_epochs": epochs},
    )
    assert (made.global_batch_size, made.num_steps) == (global_batch, steps)
    assert made.steps_per_epoch == math.ceil(90 / global_batch)


def test_global_batch_size_replaces_accumulation_and_max_steps_replaces_epochs():
    made = plan(ray={"num_workers": 2}, training={"batch_size": 4, "global_batch_size": 32, "max_steps": 7})
    assert (made.gradient_accumulation_steps, made.num_steps, made.global_batch_size) == (4, 7, 32)


def test_global_batch_that_does_not_divide_names_the_nearest_that_work():
    said = refusal(ray={"num_workers": 4}, training={"batch_size": 3, "global_batch_size": 16})
    assert said == (
        "training.batch_size=3: the global batch of 16 is not a multiple of batch_size x ray.num_workers = 3 x 4. "
        "Nearest that work: 2, 4."
    )


def test_workers_beyond_the_cluster_are_refused_with_what_it_holds():
    assert refusal(ray={"num_workers": 9}) == (
        "ray.num_workers=9: 9 x 1 CPU = 9, the cluster holds 8. "
        "Use ray.num_workers=8, or ask for less with ray.resources_per_worker."
    )
    assert "9 x 1 GPU = 9, the cluster holds 8" in refusal(GPUS, ray={"num_workers": 9})
    assert "TPU = 1, the cluster holds 0" in refusal(ray={"resources_per_worker": {"TPU": 1}})
    assert plan(ray={"num_workers": 8}).num_workers == 8


def test_rows_beyond_the_context_are_told_with_the_scaling_that_reaches_them():
    def told(length: int, scaling: dict | None = None, **facts) -> list[str]:
        base = dataclasses.replace(FACTS, context_length=2048, **facts)
        asked = config(training={"max_length": length}, model={"rope_scaling": scaling})
        return [note for note in make_plan(asked, DATA, base, CPUS, None).notes if "rope" in note or "context" in note]

    assert told(2048) == []
    (note,) = told(5000)
    assert "exceeds the base's context of 2048" in note and "model.rope_scaling={rope_type: yarn, factor: 3}" in note
    assert "rope_scaling" not in "".join(told(5000, takes_rope_scaling=False))
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert "a factor of 6 reaches that far" in "".join(told(5000, yarn))
    assert "takes the place of the base's own (llama3)" in "".join(told(2048, yarn, own_rope="llama3"))


def test_gpu_asked_but_none_there_is_refused():
    assert refusal(ray={"use_gpu": True}).startswith("ray.use_gpu=true: the cluster has no GPU.")


def test_fp16_on_cpus_is_refused_and_on_gpus_planned():
    fp16 = {"compute_dtype": "float16"}
    assert refusal(quantization=fp16).startswith("quantization.compute_dtype=float16: loss scaling needs a GPU")
    assert refusal(GPUS, quantization=fp16, ray={"use_gpu": False}).startswith("quantization.compute_dtype=float16")
    assert plan(GPUS, quantization=fp16).deepspeed["fp16"]["enabled"] is True


@pytest.mark.parametrize(
    ("hardware", "dtype", "recompute"),
    [(CPUS, "float32", "none"), (GPUS, "bfloat16", "auto"), (Hardware(8, 1, ("T4",)), "float16", "auto")],
)
def test_auto_dtype_and_recompute_fit_the_hardware(hardware, dtype, recompute):
    assert (plan(hardware).compute_dtype, plan(hardware).recompute) == (dtype, recompute)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_equals_transformers_schedule(schedule):
    import torch
    from transformers import get_scheduler

    asked = config(training={"max_steps": 50, "warmup_ratio": 0.2, "learning_rate": 3e-4, "lr_schedule": schedule})
    made = make_plan(asked, DATA, FACTS, CPUS, None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50)
    rates = []
    for _ in range(51):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    for step in range(50):  # in warmup one step ahead of theirs, whose first step has a learning rate of 0
        wanted = rates[step + 1] if step < 10 else rates[step]
        assert learning_rate_at(step, made, asked) == pytest.approx(wanted, rel=1e-9), step


def test_auto_values_of_a_deepspeed_json_are_filled_and_explicit_ones_win():
    theirs = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "initial_scale_power": 9},
        "zero_optimization": {"stage": "auto", "overlap_comm": False, "stage3_prefetch_bucket_size": "auto"},
    }  # fmt: skip
    made = plan(GPUS, theirs, ray={"num_workers": 2}, training={"batch_size": 4, "gradient_accumulation_steps": 3})
    got = made.deepspeed
    assert (got["train_batch_size"], got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]) == (
        24,
        4,
        3,
    )
    assert (got["gradient_clipping"], got["bf16"]) == (1.0, {"enabled": True})
    assert got["fp16"] == {"enabled": False, "initial_scale_power": 9}
    assert (got["zero_optimization"]["stage"], got["zero_optimization"]["overlap_comm"]) == (3, False)
    assert "auto" not in str(got)


CONTRADICTIONS = [
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2", "deepspeed.zero_stage"),
    ({"train_batch_size": 5}, "train_batch_size=5", "training.global_batch_size"),
    ({"train_micro_batch_size_per_gpu": 5}, "train_micro_batch_size_per_gpu=5", "training.batch_size"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2", "training.gradient_accumulation_steps"),
    ({"gradient_clipping": 0.5}, "gradient_clipping=0.5", "training.max_grad_norm"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer.device=cpu",
        "deepspeed.offload_optimizer",
    ),
    ({"zero_optimization": 3}, "zero_optimization=3", "must be an object"),
    ({"optimizer": {"type": "Adam"}}, "optimizer.type", "training.learning_rate"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type", "training.lr_schedule"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights", "4-bit"),
    ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "quantized_nontrainable_weights", "4-bit"),
    ({"compile": {"deepcompile": True}}, "compile.deepcompile", "DeepCompile"),
]


@pytest.mark.parametrize(
    ("theirs", "key", "reason"), CONTRADICTIONS, ids=lambda value: value if type(value) is str else ""
)
def test_deepspeed_json_that_contradicts_or_corrupts_is_refused_by_name_even_before_ray_starts(theirs, key, reason):
    said = refusal(deepspeed_json=theirs)
    assert key in said and reason in said
    with pytest.raises(ConfigError) as early:
        refuse_early(Config(), theirs)
    assert str(early.value) == said


def test_bf16_that_contradicts_is_refused_once_the_hardware_is_known():
    theirs = {"bf16": {"enabled": True}}
    refuse_early(Config(), theirs)
    assert refusal(deepspeed_json=theirs).startswith("bf16.enabled=True")
    assert plan(GPUS, theirs).deepspeed["bf16"] == {"enabled": True}


def test_base_is_whole_on_each_gpu_where_it_fits_with_activations_and_shared_where_not():
    two = {"ray": {"num_workers": 2}, "facts": DEEP}
    need = sum(plan(GPUS, deepspeed={"share_base": "replicate"}, **two).memory_forecast_gib.values())
    roomy, tight = (plan(dataclasses.replace(GPUS, gpu_gib=gib), **two) for gib in (2 * need, 0.2 * need))
    assert not roomy.shares_base and roomy.may_hold_weights
    assert roomy.why_shared.startswith("it takes ") and tight.why_shared.startswith("all of it would take ")
    assert tight.shares_base and not tight.may_hold_weights
    assert tight.memory_forecast_gib["base"] < roomy.memory_forecast_gib["base"]
    assert plan(**two).shares_base and plan(GPUS, **two).shares_base  # not known: as little as can be
    assert not plan(GPUS, ray={"num_workers": 1}, facts=DEEP).shares_base
    assert plan(dataclasses.replace(GPUS, gpu_gib=80), deepspeed={"share_base": "world"}, **two).shares_base


@pytest.mark.parametrize(
    ("workers", "stage", "why"),
    [(1, 3, "there is one worker"), (2, 2, "the ZeRO stage is 2"), (2, 3, None), ([1, 2], 3, None)],
)
def test_share_base_that_means_nothing_is_said_so_in_plan_and_run(workers, stage, why):
    asked = {"ray": {"num_workers": workers}, "deepspeed": {"zero_stage": stage, "share_base": "world"}}
    said = f"each worker holds all of the base: {why}, so deepspeed.share_base=world changes nothing"
    made, answer = plan(**asked), table.answer(config(**asked), 80, "H100")
    shown = holding.shown(made.shares_base, made.is_shared_by_node, made.why_shared)
    assert (said in answer, said == shown) == (why is not None,) * 2


def test_base_is_shared_inside_nodes_where_that_fits_and_whole_ones_do_not():
    nodes = dataclasses.replace(GPUS, num_gpus=6, num_cpus=12, nodes=({"CPU": 8, "GPU": 4}, {"CPU": 4, "GPU": 2}))
    six = {"ray": {"num_workers": 6}, "facts": DEEP}
    whole, by_node, by_all = (
        plan(nodes, deepspeed={"share_base": way}, **six) for way in ("replicate", "node", "world")
    )
    assert by_node.shares_base and by_node.is_shared_by_node and not by_all.is_shared_by_node
    shares = [made.memory_forecast_gib["base"] for made in (whole, by_node, by_all)]
    assert shares[1] - shares[2] == pytest.approx(shares[0] * (1 / 2 - 1 / 6))  # the second node has two
    need = max(memory.peak_gib(by_node.memory_forecast_gib), by_node.memory_forecast_gib["while_loading"])
    room = dataclasses.replace(nodes, gpu_gib=need * 1.0001 / memory.SHARE_OF_MEMORY)
    assert plan(room, **six).is_shared_by_node
    assert not plan(dataclasses.replace(room, nodes=()), **six).is_shared_by_node  # one node, as far as is known
    tight = plan(dataclasses.replace(room, gpu_gib=0.99 * need / memory.SHARE_OF_MEMORY), **six)
    assert tight.shares_base and not tight.is_shared_by_node
    said = refusal(nodes, deepspeed={"share_base": "node"}, model={"lora_variant": "loftq"}, ray=six["ray"])
    assert "deepspeed.share_base=node: model.lora_variant=loftq begins from whole weights" in said


@pytest.mark.parametrize(("stage", "key"), [(2, "offload_params"), (0, "offload_params"), (0, "offload_optimizer")])
def test_offload_that_its_zero_stage_cannot_do_is_refused(stage, key):
    assert refusal(deepspeed={"zero_stage": stage, key: "cpu"}).startswith(f"deepspeed.{key}=cpu: needs zero_stage")


def test_auto_zero_stage_is_3_with_several_workers_and_0_with_one():
    stages = [plan(deepspeed={"zero_stage": "auto"}, ray={"num_workers": n}).zero_stage for n in (1, 2)]
    assert stages == [0, 3]


@pytest.fixture(scope="module")
def tiny():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY)


def test_facts_of_the_embedded_base_equal_those_that_torch_counts(tiny):
    import torch

    linear = {
        name: tuple(layer.weight.shape)
        for name, layer in tiny.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    assert FACTS.num_parameters == sum(parameter.numel() for parameter in tiny.parameters())
    assert {name: (rows, columns) for name, rows, columns in FACTS.linear_shapes} == linear
    assert FACTS.num_linear_parameters == sum(rows * columns for rows, columns in linear.values())
    assert (FACTS.num_layers, FACTS.hidden_size, FACTS.vocab_size) == (
        tiny.config.num_hidden_layers, tiny.config.hidden_size, tiny.config.vocab_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["self_attn.k_proj"], r".*\.layers\.[01]\.mlp\..*_proj"]
)
def test_number_of_lora_parameters_equals_pefts(targets):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=6, target_modules=targets))
    counted = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    facts = exact_facts(config(model={"lora_r": 6, "target_modules": targets}))
    assert facts.num_trainable_parameters == counted > 0


@pytest.mark.parametrize(("cores", "size", "expected"), [(8, 1, 6), (5, 1, 5), (5, 2, 4), (2, 2, 2)])
def test_one_machine_trains_with_as_many_workers_as_it_holds_in_whole_groups(cores, size, expected):
    asked = config(ray={"num_workers": [2, 6]}, training={"sequence_parallel": size})
    assert most_workers(asked, {"CPU": 1.0}, Hardware(cores, 0)) == expected


def test_workers_that_no_single_node_can_hold_are_refused():
    nodes = ({"CPU": 3.0}, {"CPU": 3.0})
    config = Config.model_validate({"ray": {"num_workers": 3, "resources_per_worker": {"CPU": 2}}})
    with pytest.raises(ConfigError, match="2 nodes hold 2 such workers"):
        check_workers_fit(config, {"CPU": 2.0}, Hardware(6, 0, nodes=nodes))
    check_workers_fit(config, {"CPU": 1.0}, Hardware(6, 0, nodes=nodes))


def test_families_that_cannot_keep_samples_apart_get_padded_rows_and_a_note():
    opt = dataclasses.replace(FACTS, model_type="opt")
    asked = config()
    assert layout(asked, FACTS).packing and not layout(asked, opt).packing
    assert not layout(config(training={"packing": False}), FACTS).packing
    (note,) = [n for n in make_plan(asked, DATA, opt, CPUS, None).notes if "padded" in n]
    assert "opt" in note
    assert not [n for n in plan().notes + plan(training={"packing": False}).notes if "padded" in n]


def test_packing_that_leaves_few_steps_an_epoch_is_told():
    packed = dataclasses.replace(DATA, packed=True, num_samples=900)
    few = make_plan(config(training={"batch_size": 30}), packed, FACTS, CPUS, None)
    assert few.steps_per_epoch == 3
    (note,) = [n for n in few.notes if "steps" in n]
    assert "hold 10 samples each, so an epoch is only 3 steps" in note
    assert not [n for n in make_plan(config(), packed, FACTS, CPUS, None).notes if "an epoch is only" in n]


def test_plan_says_where_bits_are_not_promised():
    def said(hardware, deterministic):
        notes = plan(hardware, training={"deterministic": deterministic}).notes
        return [note for note in notes if "training.deterministic=true" in note]

    assert len(said(GPUS, False)) == 1
    assert not said(GPUS, True) + said(CPUS, False)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"lora_variant": "dora"}}, "dora: fused"),
        (
            {"model": {"lora_variant": "dora", "lora_dropout": 0.1}, "deepspeed": {"zero_stage": 2}},
            "dora: its layers are left to PEFT",
        ),
        ({"model": {"lora_dropout": 0.1}}, "model.lora_dropout=0.1: 0.97 of the speed"),
        ({"model": {"new_tokens": ["<a>"]}}, "model.new_tokens: the embedding is copied"),
        ({"model": {"modules_to_save": ["norm"]}}, "decoder layers with a norm that is trained are not fused"),
    ],
)
def test_plan_says_what_a_setting_costs_on_gpus_and_not_on_cpus(sections, said):
    assert [note for note in plan(GPUS, **sections).notes if said in note]
    assert not [note for note in plan(CPUS, **sections).notes if said in note]
    assert not [note for note in plan(GPUS).notes if said in note]


def test_plan_says_what_a_family_without_fused_layers_costs():
    gemma2 = dataclasses.replace(FACTS, model_type="gemma2")
    assert [n for n in make_plan(config(), DATA, gemma2, GPUS, None).notes if "gemma2 models are not fused" in n]
    factors = {"0.30": (5_063, 16_708), "0.97": (16_188, 16_708), "0.42": (7_040, 16_708)}
    said = Path("benchmarks/README.md").read_text()
    for factor, (slow, fast) in factors.items():
        assert f"{slow / fast:.2f}" == factor and f"{slow:,}" in said and f"{fast:,}" in said


def test_pairs_share_their_prompts_where_attention_can_and_the_plan_tells_where_not():
    asked = config(training={"objective": "dpo"})
    assert layout(asked, FACTS) == Layout(packing=True, shares_prompts=True)
    assert layout(config(training={"objective": "dpo", "share_prompts": False}), FACTS) == Layout(packing=True)
    assert layout(config(training={"objective": "dpo", "packing": False}), FACTS) == Layout(False, True)
    assert layout(config(), FACTS) == Layout(packing=True)
    other = dataclasses.replace(FACTS, model_type="bloom")
    assert layout(asked, other) == Layout(packing=False)
    for training in ({}, {"packing": False}):
        asked = config(training={"objective": "dpo", **training})
        notes = make_plan(asked, dataclasses.replace(DATA, pairs=True), other, CPUS, None).notes
        assert any("a prompt of its own" in note for note in notes)


def test_row_of_pairs_that_share_prompts_is_planned_by_its_length_and_its_positions():
    asked = config(training={"objective": "dpo", "batch_size": 3, "max_length": 40})
    shared = dataclasses.replace(DATA, pairs=True, shares_prompts=True, longest_row=70, max_length=40)
    plan = make_plan(asked, shared, dataclasses.replace(FACTS, num_positions=40), CPUS, None)
    assert (plan.tokens_per_micro_batch, plan.longest_sample) == (210, 40)
    with pytest.raises(ConfigError, match="the longest sample has 40 tokens"):
        make_plan(asked, shared, dataclasses.replace(FACTS, num_positions=36), CPUS, None)


def test_micro_batch_of_pairs_holds_two_rows_of_tokens_for_each_row():
    asked = config(training={"objective": "dpo", "batch_size": 3, "max_length": 40})
    of_pairs, of_answers = (
        make_plan(asked, dataclasses.replace(DATA, pairs=pairs), FACTS, CPUS, None) for pairs in (True, False)
    )
    assert (of_pairs.tokens_per_micro_batch, of_answers.tokens_per_micro_batch) == (240, 120)
    assert of_pairs.longest_sample == of_answers.longest_sample == 40
    assert of_pairs.num_steps == of_answers.num_steps
    assert of_pairs.memory_forecast_gib["activations"] > of_answers.memory_forecast_gib["activations"]
