"""Experts in 4 bits: bitsandbytes' own bits, PEFT's losses and gradients, one result however they are shared."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qlora_ray.config import base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.inference import merge
from qlora_ray.inference.load import load as load_for_use
from qlora_ray.model import mixture, routed
from qlora_ray.model.adapter import ADAPTER_NAME, add_adapter, load_adapter, trainable
from qlora_ray.model.balance import balance, balance_of
from qlora_ray.model.base import count_bytes, load_base
from qlora_ray.model.experts import is_packed, packed_stacks
from qlora_ray.model.fused import fuse, fused_layers, keep, leaf_modules
from qlora_ray.model.load import Whole, load_shares
from qlora_ray.model.recompute import Choice, Keep
from qlora_ray.model.record import FILE, open_adapter
from qlora_ray.model.routed import compute_in_4_bits
from qlora_ray.planning import early
from qlora_ray.planning.early import exact_facts
from qlora_ray.storage import open_folder
from qlora_ray.worker.export import write_adapter
from qlora_ray.worker.loss import num_label_tokens, sum_of_nats
from qlora_ray.worker.routing import busiest_expert
from tests.integration import adapters, engines, tiny_models

CPU = torch.device("cpu")
FAMILIES = list(tiny_models.MIXTURES)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """A folder of each family, made once."""
    folders: dict[str, str] = {}

    def folder_of(family: str) -> str:
        if family not in folders:
            folders[family] = tiny_models.save(family, tmp_path_factory.mktemp(family))
            stir(Path(folders[family]))
        return folders[family]

    return folder_of


def stir(folder: Path) -> None:
    """Give biases and the routers' corrections, which begin as zeros, values that matter."""
    from safetensors.torch import load_file, save_file

    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(2)
    for name, weight in weights.items():
        if "bias" in name or weight.dim() == 1 or ".gate.weight" in name or "router" in name:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: str, **sections):
    config = tiny_models.make_config(folder, **sections)
    return load_base(config.model, config.quantization, "float32", CPU)


def dense(folder: str):
    """The base as plain transformers loads it, with the values that its 4-bit weights stand for."""
    packed, model = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in packed.named_parameters():
        if hasattr(parameter, "quant_state"):
            model.get_parameter(name).data.copy_(dequantize_4bit(parameter.data, parameter.quant_state))
    return model.requires_grad_(False)


@pytest.mark.bites("model.experts.STACKS_TOO")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_have_the_bits_of_bitsandbytes_and_are_what_the_plan_counts(family, base_of):
    folder = base_of(family)
    base, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert packed_stacks(base)
    for name in packed_stacks(base):
        packed = base.get_parameter(name)
        bits, state = quantize_4bit(plain.get_parameter(name), quant_type="nf4", compress_statistics=True)
        assert torch.equal(packed.data, bits)
        assert torch.equal(packed.quant_state.absmax, state.absmax) and packed.quant_state.offset == state.offset
    facts, stored = exact_facts(tiny_models.make_config(folder)), count_bytes(base)
    assert facts.num_packed_parameters == stored.four_bit_parameters
    assert facts.num_parameters == stored.parameters
    assert facts.experts.num_packed == facts.experts.num_parameters > 0


@pytest.mark.parametrize("expert_lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_the_lora_are_those_of_peft_on_the_dense_base(family, expert_lora, base_of):
    config = tiny_models.make_config(base_of(family), model={"expert_lora": expert_lora})
    ours = add_adapter(load(config.model.base_model), config.model, torch.float32, seed=0).train()
    theirs = add_adapter(dense(config.model.base_model), config.model, torch.float32, seed=0).train()
    names = list(trainable(ours))
    fuse(ours)
    assert names == list(trainable(theirs)) and not any(".gate." in name or ".router." in name for name in names)
    assert any(".experts." in name for name in names) == expert_lora
    assert exact_facts(config).num_trainable_parameters == sum(one.numel() for one in trainable(ours).values())
    with_values(ours), with_values(theirs)
    losses = [sum_of_nats(model, tiny_models.batch()) for model in (ours, theirs)]
    assert abs(losses[0].item() / losses[1].item() - 1) < 1e-6
    for loss in losses:
        loss.backward()
    for name, one in trainable(ours).items():
        other = trainable(theirs)[name]
        assert tiny_models.difference(one.grad, other.grad) < 1e-4, name


def with_values(adapted):
    """The adapted model, its matrices far from what they begin as."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(adapted).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_what_a_layer_with_adapted_experts_keeps_changes_no_bit(family, base_of):
    config = tiny_models.make_config(base_of(family), model={"expert_lora": True})
    model = with_values(add_adapter(load(config.model.base_model), config.model, torch.float32, seed=0)).train()
    fuse(model)
    found = []
    for level in Keep:
        keep(model, Choice((level,) * len(fused_layers(model))))
        sum_of_nats(model, tiny_models.batch()).backward()
        found.append([parameter.grad.clone() for parameter in trainable(model).values()])
        model.zero_grad()
    assert len(fused_layers(model)) == 2
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe", "gpt_oss"])
def test_layers_that_keep_their_input_keep_nothing_that_a_mixture_reads(family, base_of, monkeypatch):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from torch.multiprocessing.reductions import StorageWeakRef

    config, read = tiny_models.make_config(base_of(family)), []
    model = add_adapter(load(config.model.base_model), config.model, torch.float32, seed=0).train()
    fuse(model)
    keep(model, Choice((Keep.INPUT,) * len(fused_layers(model))))
    plain = mixture.NoProjections.buffer

    def buffer(self, like):
        made = plain(self, like)
        read.append(StorageWeakRef(made.untyped_storage()))
        return made

    monkeypatch.setattr(mixture.NoProjections, "buffer", buffer)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)  # as ZeRO-3 does: it saves what it reads
    loss = sum_of_nats(model, tiny_models.batch())
    assert read and all(one.expired() for one in read)
    loss.backward()


@pytest.mark.bites("model.balance.ROUTERS")
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "olmoe"])
def test_load_balancing_loss_has_the_gradient_of_transformers_own_of_each_layer(family, base_of):
    config = tiny_models.make_config(base_of(family))
    ours = with_values(add_adapter(load(config.model.base_model), config.model, torch.float32, seed=0)).train()
    theirs = with_values(add_adapter(dense(config.model.base_model), config.model, torch.float32, seed=0)).train()
    fuse(ours)
    balance(ours, 3.0)
    batch, gradients = tiny_models.batch(), []
    count = num_label_tokens(batch)
    for is_on in (False, True):
        nats = sum_of_nats(ours, batch)
        if is_on:
            balance_of(ours).follow(nats, count)
        else:
            balance_of(ours).weight = torch.zeros(())
        (nats / count).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trainable(ours).items()})
        ours.zero_grad()
    made = theirs(input_ids=batch["input_ids"], output_router_logits=True, use_cache=False)
    nats = torch.nn.functional.cross_entropy(
        made.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    losses = [load_balancing_loss_func((one,), one.shape[1], 2) for one in made.router_logits]
    assert len(losses) == 2
    (nats / count + 3.0 * sum(losses) / 2).backward()
    assert max(tiny_models.difference(gradients[0][n], p.grad) for n, p in trainable(theirs).items()) > 1e-2
    for name, parameter in trainable(theirs).items():
        assert tiny_models.difference(gradients[1][name], parameter.grad) < 1e-4, name


@pytest.mark.parametrize("family", ["llama", "glm4_moe"])
def test_load_balancing_loss_of_a_base_that_has_none_is_refused_by_the_driver(family, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    with pytest.raises(ConfigError, match="^training.router_aux_loss_coef=0.01: .* have no load-balancing loss"):
        exact_facts(tiny_models.make_config(folder, training={"router_aux_loss_coef": 0.01}))


def test_share_of_the_busiest_expert_is_that_of_the_tokens_it_had_in_training(base_of):
    model, team = load(base_of("qwen3_moe")), engines.Alone()
    assert busiest_expert(model, team) == {}
    for route, layer in zip(("some", "one"), model.model.layers, strict=True):
        x, index, scores = routed_to([[0, 1], [3, 1], [0, 3], [1, 0]] if route == "some" else [[2, 1], [2, 0]])
        layer.mlp.experts.train()(x, index, scores)
        layer.mlp.experts.eval()(x, index, scores)
    assert busiest_expert(model, team) == {"busiest_expert_share": 1.0}
    model.model.layers[0].mlp.experts.train()(*routed_to([[0, 1], [3, 1], [0, 3], [1, 0]]))
    assert busiest_expert(model, team) == {"busiest_expert_share": 0.75}


@pytest.mark.bites("model.peft_names.TAKEN_AS_WRITTEN")
@pytest.mark.parametrize("expert_lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_trained_under_zero3_has_its_logits_in_plain_peft(
    family, expert_lora, base_of, tmp_path, process_group
):
    folder = base_of(family)
    config = tiny_models.make_config(folder, deepspeed={"zero_stage": 3}, model={"expert_lora": expert_lora})
    engine = engines.build(config, tmp_path)
    parts = [id(part) for leaf in leaf_modules(engine.module) for part in leaf.modules()]
    assert {parts.count(id(module)) for module in engine.module.modules() if is_packed(module)} == {1}
    losses = engines.train(engine, range(8))
    assert losses[-1] < losses[0] - 0.05
    adapter = open_folder(str(tmp_path / "adapter"))
    write_adapter(adapter, engine.module, engine.weights(), AutoTokenizer.from_pretrained(folder))
    live = tiny_models.logits(engine.module)
    plain = PeftModel.from_pretrained(dense(folder), adapter.path)
    assert tiny_models.difference(live, tiny_models.logits(plain)) < 1e-6
    ours = load_adapter(load(folder), adapter.path)
    compute_in_4_bits(ours)
    assert tiny_models.difference(live, tiny_models.logits(ours)) < 1e-6


IN_A_FRESH_PROCESS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for base, adapter, ids, out in zip(*[iter(sys.argv[1:])] * 4):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(ids), use_cache=False).logits, out)
assert not any(name.startswith("qlora_ray") for name in sys.modules)
"""


def test_adapter_on_experts_has_its_logits_in_a_process_that_knows_plain_peft_alone(base_of, tmp_path):
    torch.save(tiny_models.batch()["input_ids"], tmp_path / "ids.pt")
    live, asked = {}, []
    for family in ("qwen3_moe", "gpt_oss"):
        place = tmp_path / family
        folder = adapters.trained(place / "run", base_of(family), steps=4, expert_lora=True)
        dense(base_of(family)).save_pretrained(place / "dense")
        live[family] = tiny_models.logits(load_for_use(open_adapter(str(folder)), CPU).model)
        asked += [place / "dense", folder, tmp_path / "ids.pt", place / "logits.pt"]
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, *asked], check=True, timeout=200, cwd=tmp_path)
    for family, logits in live.items():
        assert tiny_models.difference(logits, torch.load(tmp_path / family / "logits.pt")) < 1e-6


@pytest.mark.bites("model.stack_files.CONVERSIONS")
@pytest.mark.parametrize("expert_lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_mixture_has_the_logits_of_the_adapter_on_its_packed_experts(family, expert_lora, base_of, tmp_path):
    folder = adapters.trained(tmp_path / "run", base_of(family), steps=4, expert_lora=expert_lora)
    adapter = open_adapter(str(folder))
    assert len(adapter.packed_stacks) > 0
    merge.merge(adapter, tmp_path / "merged", "training", "float32", CPU)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    live = tiny_models.logits(load_for_use(adapter, CPU).model)
    assert tiny_models.difference(live, tiny_models.logits(merged)) < 2e-5
    merge.merge(adapter, tmp_path / "original", "original", "float32", CPU)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.float32)
    assert tiny_models.difference(live, tiny_models.logits(original)) > 1e-3


def test_adapter_of_an_earlier_version_is_used_on_experts_in_16_bits_as_it_was_trained(base_of, tmp_path):
    folder = adapters.trained(tmp_path / "run", base_of("qwen3_moe"), steps=1)
    record = json.loads((folder / FILE).read_text())
    del record["four_bit_stacks"]
    (folder / FILE).write_text(json.dumps(record))
    assert packed_stacks(load_for_use(open_adapter(str(folder)), CPU).model) == []


@pytest.mark.parametrize(("variant", "scaling"), [("lora", 4.0), ("rslora", 32 / 8**0.5)])
def test_an_experts_lora_has_its_share_of_the_rank_and_the_scale_of_the_others(variant, scaling, base_of):
    config = tiny_models.make_config(base_of("mixtral"), model={"expert_lora": True, "lora_variant": variant})
    adapted = add_adapter(load(config.model.base_model), config.model, torch.float32, 0)
    loras = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    assert {lora.r[ADAPTER_NAME] for lora in loras if hasattr(lora, "parameter_name")} == {8 // 2}
    assert {round(lora.scaling[ADAPTER_NAME], 6) for lora in loras} == {round(scaling, 6)}


@pytest.mark.parametrize(
    ("family", "model", "said"),
    [
        ("qwen3_moe", {"lora_dropout": 0.1}, "^model.lora_dropout=0.1: PEFT has none on experts"),
        ("qwen3_moe", {"lora_variant": "dora"}, "^model.lora_variant=dora: PEFT has none on experts"),
        ("llama", {}, "^model.expert_lora=true: llama has no experts"),
    ],
)
def test_expert_lora_that_peft_does_not_have_is_refused_by_the_driver(family, model, said, tmp_path):
    folder = tiny_models.save(family, tmp_path)
    with pytest.raises(ConfigError, match=said):
        exact_facts(tiny_models.make_config(folder, model={"expert_lora": True, **model}))


def routed_to(experts: list[list[int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the experts of each and their scores."""
    index, generator = torch.tensor(experts), torch.Generator().manual_seed(seed)
    x = torch.randn(len(index), tiny_models.SIZES["hidden_size"], generator=generator)
    return x, index, torch.rand(index.shape, generator=generator)


ROUTES = {
    "an expert without tokens": [[0, 1], [3, 1], [0, 3], [1, 0], [3, 0]],
    "all tokens on one": [[2]] * 6,
    "one expert each": [[3], [0], [1], [1]],
    "all experts each": [[0, 1, 2, 3], [3, 2, 1, 0]],
    "one token": [[1, 3]],
}


@pytest.mark.parametrize("chunk_bytes", [routed.EXPERT_CHUNK_BYTES, 1])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_and_their_gradients_are_those_of_transformers_own_loop(
    family, route, chunk_bytes, base_of, monkeypatch
):
    monkeypatch.setattr(routed, "EXPERT_CHUNK_BYTES", chunk_bytes)
    ours, theirs = (outcome(experts, ROUTES[route]) for experts in experts_of(base_of(family)))
    for one, other in zip(ours, theirs, strict=True):
        assert tiny_models.difference(one, other) < 1e-5


def experts_of(folder: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and transformers' own loop."""
    ours, theirs = (model.model.layers[1].mlp.experts for model in (load(folder), dense(folder)))
    theirs.config._experts_implementation = "eager"
    return ours, theirs


def outcome(experts: torch.nn.Module, route: list[list[int]], scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """What comes out for tokens of this size, and the gradients of tokens and scores."""
    x, index, scores = routed_to(route)
    x *= scale
    y = experts(x.requires_grad_(), index, scores.requires_grad_())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
    return y.detach(), x.grad, scores.grad


def test_clamp_of_gpt_oss_is_transformers_where_values_exceed_it(base_of):
    ours, theirs = experts_of(base_of("gpt_oss"))
    clamped = [outcome(experts, ROUTES["all experts each"], scale=100.0) for experts in (ours, theirs)]
    for one, other in zip(*clamped, strict=True):
        assert tiny_models.difference(one, other) < 1e-5
    theirs.limit = 1e9
    without = outcome(theirs, ROUTES["all experts each"], scale=100.0)
    assert tiny_models.difference(without[0], clamped[1][0]) > 0.1 < tiny_models.difference(without[1], clamped[1][1])


def test_what_a_chunk_holds_does_not_change_the_bits(base_of, monkeypatch):
    model = load(base_of("mixtral"))
    whole = tiny_models.logits(model)
    monkeypatch.setattr(routed, "EXPERT_CHUNK_BYTES", 3 * 128 * 64 * 4)  # three experts of four
    assert torch.equal(whole, tiny_models.logits(model))


def test_experts_that_compute_otherwise_stay_in_16_bits_and_the_plan_says_how_much(tmp_path):
    sizes = dict(num_local_experts=4, intermediate_size_mlp=64, interleave_moe_layer_step=1, head_dim=16)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama4_text", **{**tiny_models.SIZES, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base_model_path("embedded")).save_pretrained(tmp_path)
    asked = tiny_models.make_config(str(tmp_path))
    stored, facts = count_bytes(load(str(tmp_path))), exact_facts(asked)
    assert not packed_stacks(load(str(tmp_path))) and facts.experts.num_packed == 0
    assert facts.num_packed_parameters == stored.four_bit_parameters
    plan = engines.plan_of(asked, engines.rows_of_batch(tmp_path / "cache"))
    share = facts.experts.num_parameters / facts.num_parameters
    assert any(
        note.startswith(f"{share:.0%} of the base's weights are experts that stay 16-bit") for note in plan.notes
    )


def in_mxfp4(folder: str, target: Path) -> str:
    """A copy with random stacks in MXFP4, as they are published; and what they stand for put into `folder`."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shutil.copytree(folder, target)
    dense = load_file(target / "model.safetensors")
    weights, generator = dict(dense), torch.Generator().manual_seed(3)
    for name in [name for name in dense if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, inputs, outputs = weights.pop(name).shape
        blocks = torch.randint(256, (num_experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 123, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.bites("model.mxfp4.BLOCKS_AND_SCALES")
def test_experts_in_mxfp4_become_the_4_bits_of_what_they_stand_for_whole_and_in_shares(tmp_path):
    folder = tiny_models.save("gpt_oss", tmp_path / "dense")
    published = in_mxfp4(folder, tmp_path / "mxfp4")
    config = tiny_models.make_config(published)
    shares, sources = load_shares(config.model, config.quantization, "float32", CPU, Whole())
    expected = load(folder)
    assert not any(isinstance(source.value, torch.Tensor) for source in sources)
    for base in (load(published), shares):
        for name, parameter in expected.named_parameters():
            assert torch.equal(base.get_parameter(name).data.view(-1), parameter.data.view(-1)), name
        assert torch.equal(tiny_models.logits(base), tiny_models.logits(expected))
    assert exact_facts(config).num_packed_parameters == count_bytes(expected).four_bit_parameters
    assert exact_facts(config).num_parameters == count_bytes(expected).parameters
    with pytest.raises(ConfigError, match="^quantization.type=none: .* is stored in MXFP4"):
        early._check_base(tiny_models.make_config(published, quantization={"type": "none"}), published)
