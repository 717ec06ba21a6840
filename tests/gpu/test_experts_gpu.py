"""Experts in 4 bits on a GPU: one grouped product against the loop, and whole models against the CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_ray.model import routed
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import load_base
from qlora_ray.model.experts import is_packed
from qlora_ray.model.fused import fuse
from qlora_ray.model.ops import ops_for
from qlora_ray.model.ops_plain import Clamp
from qlora_ray.worker.loss import sum_of_nats
from tests.integration import engines, tiny_models

pytestmark = pytest.mark.gpu
# Of a tensor's norm: some roundings of bfloat16, which a kernel does in other places.
TOLERANCE = 2e-2
ROUTES = {
    "some": [[0, 1], [3, 1], [0, 3], [1, 0], [3, 0]] * 7, "one": [[2, 2]] * 9, "all": [[0, 1], [2, 3]] * 8,
    "one token": [[1, 3]],
}  # fmt: skip


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


def load(folder: str, dtype: str, device: str):
    config = tiny_models.make_config(folder)
    return load_base(config.model, config.quantization, dtype, torch.device(device))


def saved_in_16_bits(family: str, folder) -> str:
    """Weights that are the same in bfloat16 and float32, so that both are packed to the same bytes."""
    made = tiny_models.save(family, folder / "made")
    AutoModelForCausalLM.from_pretrained(made).bfloat16().save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(made).save_pretrained(folder / "base")
    return str(folder / "base")


def outcome(experts, route: list[list[int]], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """What comes out, and the gradients of what went in."""
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor(route)
    x, scores = torch.randn(len(index), 64, generator=generator), torch.rand(index.shape, generator=generator)
    grad = torch.randn(x.shape, generator=generator).to(device, dtype)
    x, scores = (value.to(device, dtype).requires_grad_() for value in (x, scores))
    y = experts(x, index.to(device), scores)
    y.backward(grad)
    return [y.detach(), x.grad, scores.grad]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("chunk_bytes", [routed.EXPERT_CHUNK_BYTES, 1])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_grouped_product_is_the_loop_on_a_cpu(family, chunk_bytes, route, tmp_path, monkeypatch):
    monkeypatch.setattr(routed, "EXPERT_CHUNK_BYTES", chunk_bytes)
    folder = saved_in_16_bits(family, tmp_path)
    on_gpu, on_cpu = load(folder, "bfloat16", "cuda"), load(folder, "float32", "cpu")
    experts = [next(m for m in model.modules() if is_packed(m)) for model in (on_gpu, on_cpu)]
    ours = outcome(experts[0], ROUTES[route], torch.bfloat16, "cuda")
    theirs = outcome(experts[1], ROUTES[route], torch.float32, "cpu")
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other) < TOLERANCE


def test_grouped_product_is_taken_and_is_the_loop_within_rounding():
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(300, 256, device="cuda", generator=generator).bfloat16()
    weights = torch.randn(6, 512, 256, device="cuda", generator=generator).bfloat16()
    rows = routed.Rows(torch.tensor([0, 100, 100, 250, 299, 300], dtype=torch.int32, device="cuda"))
    assert routed._has_grouped_product(x)
    for one, operand in ((weights.mT, x), (weights, torch.randn(300, 512, device="cuda").bfloat16())):
        exact = routed.grouped(operand.float(), one.float(), rows)
        assert error(routed.grouped(operand, one, rows), exact) < 5e-3


def test_row_steps_of_experts_are_those_of_plain_pytorch():
    generator = torch.Generator().manual_seed(0)
    rows, grad, gate_up = (  # values of bfloat16: else some lie on one side of the clamp there, and on the other here
        torch.randn(*shape, generator=generator).bfloat16().float() for shape in ((300, 1100), (50, 1100), (50, 2200))
    )
    scores = torch.rand(100, 3, generator=generator)
    places = torch.randperm(300, generator=generator).view(100, 3).int()
    outcomes = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        out = torch.empty(100, 1100, device=device, dtype=dtype)
        ops = ops_for(torch.device(device))
        ops.sum_of_rows(rows.to(device, dtype), places.to(device), scores.to(device), out)
        dh, up = (value.to(device, dtype, copy=True) for value in (grad, gate_up))
        made = [out, ops.activate_backward_with_dots(dh, up), dh, up]
        dh, up = (value.to(device, dtype, copy=True) for value in (grad, gate_up))
        out = torch.empty_like(dh)
        ops.clamped_glu(up, Clamp(1.702, 1.0), out)
        outcomes.append([*made, out, ops.clamped_glu_backward(dh, up, Clamp(1.702, 1.0)), dh, up])
    errors = [error(one, other) for one, other in zip(*outcomes, strict=True)]
    assert max(errors) < TOLERANCE, errors


def test_experts_repeat_their_bits(tmp_path):
    folder = tiny_models.save("qwen3_moe", tmp_path)
    experts = next(module for module in load(folder, "bfloat16", "cuda").modules() if is_packed(module))
    first, second = (outcome(experts, ROUTES["some"], torch.bfloat16, "cuda") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("family", tiny_models.MIXTURES)
def test_loss_and_gradients_of_a_mixture_are_those_of_the_cpu_in_float32(family, tmp_path):
    config = tiny_models.make_config(tiny_models.save(family, tmp_path))
    outcomes = []
    for device in ("cuda", "cpu"):
        model = add_adapter(load(config.model.base_model, "float32", device), config.model, torch.float32, 0).train()
        generator = torch.Generator().manual_seed(1)
        for parameter in trainable(model).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        fuse(model)
        nats = sum_of_nats(model, {name: value.to(device) for name, value in tiny_models.batch().items()})
        nats.backward()
        outcomes.append((nats.item(), [parameter.grad for parameter in trainable(model).values()]))
    (ours, gradients), (theirs, others) = outcomes
    assert ours == pytest.approx(theirs, rel=1e-4)
    # The GPU's packing may round a value on the edge of two codes the other way.
    assert all(error(one, other) < TOLERANCE for one, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("stage", [0, 3])
def test_mixture_trains_on_a_gpu_in_bfloat16(stage, tmp_path, nccl):
    folder = tiny_models.save("qwen3_moe", tmp_path / "base")
    engine = engines.build(tiny_models.make_config(folder, deepspeed={"zero_stage": stage}), tmp_path, device="cuda")
    losses = engines.train(engine, range(8))
    assert losses[-1] < losses[0] - 0.05
