"""The fused path on a GPU: Triton kernels against plain PyTorch, whole models against PEFT on bitsandbytes."""

import pytest
import torch

from qlora_ray.model.families import FAMILIES
from qlora_ray.model.fused import keep
from qlora_ray.model.layer import NUM_TOGETHER
from qlora_ray.model.norm import Norm
from qlora_ray.model.ops_plain import Angles, Placed
from qlora_ray.model.recompute import Choice, Keep
from tests import fused_models
from tests.integration import tiny_models

pytestmark = pytest.mark.gpu
# Of a tensor's norm: some roundings of each type, which a kernel and plain PyTorch do in other places.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


def assert_close(ours: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype):
    error = (ours.double() - plain.double()).norm() / plain.double().norm()
    assert error < TOLERANCE[dtype]


@pytest.mark.bites("model.ops_plain.PACKED_FORMAT")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantized_weights_are_bitsandbytes_bit_for_bit(dtype, quant_type, double_quant):
    from bitsandbytes.nn import Params4bit

    from qlora_ray.model import ops_plain, ops_triton

    weight = Params4bit(
        random(1536, 4096, dtype=dtype) * 0.02, requires_grad=False, quant_type=quant_type,
        compress_statistics=double_quant,
    ).to("cuda")  # fmt: skip
    for gain in (None, torch.rand(1536, device="cuda") + 0.5):
        ours, theirs = (torch.full((1536, 4096 + 48), 7.0, device="cuda", dtype=dtype) for _ in range(2))
        ops_triton.dequantize(weight, gain, ours[:, :4096])
        ops_plain.dequantize(weight, gain, theirs[:, :4096])
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, columns, rank", [(1536, 4096, 16), (1000, 1088, 8), (17, 14336, 64)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_lengths_of_rows_with_their_lora(dtype, rows, columns, rank, double_quant):
    from bitsandbytes.nn import Params4bit

    from qlora_ray.model import ops_plain, ops_triton

    weight = Params4bit(
        random(rows, columns, dtype=dtype) * 0.02, requires_grad=False, quant_type="nf4",
        compress_statistics=double_quant,
    ).to("cuda")  # fmt: skip
    a, b = random(rank, columns, dtype=dtype) * 0.1, random(rows, rank, dtype=dtype) * 0.1
    ours, plain = (ops.row_lengths(weight, a, b, 2.0) for ops in (ops_triton, ops_plain))
    assert (ours - plain).norm() < 1e-5 * plain.norm()
    assert torch.equal(ours, ops_triton.row_lengths(weight, a, b, 2.0))  # the same bits each time


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_gain", [False, True])
def test_place_of_b_among_the_columns_of_a_group(dtype, has_gain):
    from qlora_ray.model import ops_plain, ops_triton

    b, gain = random(1000, 16, dtype=dtype), torch.rand(1000, device="cuda") if has_gain else None
    for placed in (Placed(b, 2.0, 16, gain), None):
        ours, plain = (torch.full((1000, 48), 7.0, device="cuda", dtype=dtype) for _ in range(2))
        ops_triton.place(placed, ours)
        ops_plain.place(placed, plain)
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [4096, 3584, 96])
@pytest.mark.parametrize(
    "kind", [{"rounds_first": True}, {"plus_one": True}, {}, {"centers": True}, {"centers": True, "has_bias": True}]
)
def test_norm_and_its_gradient(dtype, width, kind):
    from qlora_ray.model import ops_plain, ops_triton

    x, added, weight = random(70, width, dtype=dtype), random(70, width, dtype=dtype), random(width, dtype=dtype)
    bias = random(width, dtype=dtype) if "has_bias" in kind else None
    norm = Norm(weight, 1e-5, bias=bias, **{name: value for name, value in kind.items() if name != "has_bias"})
    outcomes = []
    for ops in (ops_triton, ops_plain):
        total, out = added.clone(), torch.zeros(70, width + 16, device="cuda", dtype=dtype)
        ops.norm_rows(x, total, norm, out[:, :width])
        back = torch.zeros(70, width + 24, device="cuda", dtype=dtype)
        ops.norm_rows_backward(out[:, :width], total, norm, x, back[:, :width])
        outcomes.append((out, total, back))
    for ours, plain in zip(*outcomes, strict=True):
        assert_close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups, width", [(32, 128), (8, 256), (1, 4096), (5, 80)])
@pytest.mark.parametrize("plus_one, rounds_first", [(False, True), (True, False), (False, False)])
def test_norm_of_heads_and_its_gradient(dtype, groups, width, plus_one, rounds_first):
    from qlora_ray.model import ops_plain, ops_triton

    rows, grads = random(70, groups + 3, width, dtype=dtype), random(70, groups + 2, width, dtype=dtype)
    norm = Norm(random(width, dtype=dtype), 1e-6, plus_one, rounds_first)
    outcomes = []
    for ops in (ops_triton, ops_plain):
        out, back = torch.zeros(70, groups + 1, width, device="cuda", dtype=dtype), grads.clone()
        ops.norm_groups(rows[:, :groups], norm, out[:, :groups])
        ops.norm_groups_backward(back[:, :groups], rows[:, :groups], norm)
        outcomes.append((out, back))
    for ours, plain in zip(*outcomes, strict=True):
        assert_close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, few, size", [(32, 8, 128), (28, 4, 128), (14, 2, 64)])
@pytest.mark.parametrize(
    "share, interleaved, wide", [(1, False, False), (2, False, False), (2, True, True), (0, False, False)]
)
def test_rotation_and_its_gradient(dtype, heads, few, size, share, interleaved, wide):
    from qlora_ray.model import ops_plain, ops_triton

    angles = None
    if share:  # of a head, that is rotated
        turns = torch.rand(24, size // share // 2, device="cuda").repeat(1, 2) * 6
        angles = Angles(*(part if wide else part.to(dtype) for part in (turns.cos(), turns.sin())), interleaved)
    rows = random(48, heads + 2 * few, size, dtype=dtype)
    gradients = [random(2, 24, count, size, dtype=dtype).transpose(1, 2) for count in (heads, few, few)]
    outcomes = []
    for ops in (ops_triton, ops_plain):
        rotated, back = rows.clone(), torch.zeros(48, (heads + 2 * few) * size, device="cuda", dtype=dtype)
        if angles:
            ops.rotate(rotated[:, : heads + few], angles)
        ops.rotate_backward(*gradients, angles, back)
        outcomes.append((rotated, back))
    for ours, plain in zip(*outcomes, strict=True):
        assert_close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_activation_and_its_gradient(dtype, is_gelu, is_gated):
    from qlora_ray.model import ops_plain, ops_triton

    read, grad = random(70, (1 + is_gated) * 1000, dtype=dtype), random(70, 1000, dtype=dtype)
    outcomes = []
    for ops in (ops_triton, ops_plain):
        out, h, again, back, apart = torch.zeros_like(grad), grad.clone(), grad.clone(), read.clone(), read * 0
        ops.activate(read, is_gelu, out)
        ops.activate_backward(h, back, is_gelu, back)
        ops.activate_backward(again, read, is_gelu, apart)
        assert torch.equal(back, apart) and torch.equal(h, again)
        outcomes.append((out, h, back))
    for ours, plain in zip(*outcomes, strict=True):
        assert_close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width", [(300, 4096), (70, 1000), (8191, 250)])
def test_dropped_values(dtype, rows, width):
    from qlora_ray.model import ops_plain, ops_triton
    from qlora_ray.model.dropout import drop_of

    x, drop = random(rows, width, dtype=dtype), drop_of(0.1, 2**40 + 3, 17)
    ours, plain = (torch.full((rows, width + 16), 7.0, device="cuda", dtype=dtype) for _ in range(2))
    ops_triton.drop_values(x, drop, ours[:, :width])
    ops_plain.drop_values(x, drop, plain[:, :width])
    assert torch.equal(ours == 0, plain == 0)
    assert_close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_and_its_gradient(dtype):
    from qlora_ray.model import ops_plain, ops_triton

    logits, labels = random(70, 50_001, dtype=dtype) * 3, torch.randint(0, 50_001, (70,), device="cuda")
    labels[::7] = -100
    outcomes = []
    for ops in (ops_triton, ops_plain):
        gradient = logits.clone()
        outcomes.append((ops.cross_entropy(gradient, labels, -100, 1.0), gradient))
    for ours, plain in zip(*outcomes, strict=True):
        assert_close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width, rank", [(300, 4096, 16), (70, 1000, 48), (8192, 256, 8), (300, 512, 384)])
@pytest.mark.parametrize("is_part", [False, True])
def test_dropout_of_what_a_lora_reads_and_its_gradients(dtype, rows, width, rank, is_part):
    from qlora_ray.model import ops_plain, ops_triton
    from qlora_ray.model.dropout import drop_of

    numbers = torch.arange(rows, dtype=torch.int32, device="cuda") + 70_001 if is_part else None
    drop = drop_of(0.1, 2**40 + 3, 17, numbers)
    buffer = random(rows, width + rank, dtype=dtype)  # as in a fused layer: input and LoRA side by side
    x, a, dz = buffer[:, :width], random(rank, width, dtype=dtype), random(rows, rank, dtype=dtype)
    dx = random(rows, width + 16, dtype=dtype)
    outcomes = []
    for ops in (ops_triton, ops_plain):
        z, back = torch.full((rows, rank), 7.0, device="cuda", dtype=dtype), dx.clone()
        ops.lora_in(x, a, drop, z)
        ops.add_lora_back(dz, a, drop, back[:, :width])
        outcomes.append((z, ops.lora_in_gradient(dz, x, drop), back))
    for ours, plain in zip(*outcomes, strict=True):
        assert_close(ours, plain, dtype)
    assert torch.equal(ops_triton.lora_in_gradient(dz, x, drop), outcomes[0][1])  # the same bits each time


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width, room", [(70, 1000, 0), (8192, 4096, 16), (1, 129, 8), (1025, 64, 0)])
def test_dots_of_columns(dtype, rows, width, room):
    from qlora_ray.model import ops_plain, ops_triton

    one, other = random(rows, width + room, dtype=dtype)[:, :width], random(rows, width, dtype=dtype)
    ours, plain = ops_triton.column_dots(one, other), ops_plain.column_dots(one, other)
    assert ours.dtype == torch.float32
    assert (ours - plain).norm() < 1e-5 * plain.norm()
    assert torch.equal(ours, ops_triton.column_dots(one, other))  # the same bits each time


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: fused_models.save(family, tmp_path_factory.mktemp(family)) for family in (*FAMILIES, "gemma2")}


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_gradients_are_those_of_peft_in_float64(folders, family):
    nats, gradients = fused_models.nats_and_gradients(
        fused_models.build(folders[family], torch.float32, "cuda"), tiny_models.batch()
    )
    exact_nats, exact = fused_models.nats_and_gradients(
        fused_models.build_reference(folders[family], "cuda"), tiny_models.batch()
    )
    assert nats == pytest.approx(exact_nats, rel=1e-5)
    assert fused_models.error(gradients, exact) < 1e-4


@pytest.mark.parametrize("together", [1, 20])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "granite", "gpt2"])
def test_places_without_a_label_are_left_out_where_they_cannot_matter(folders, family, together, monkeypatch):
    monkeypatch.setitem(NUM_TOGETHER, "cuda", together)
    model = fused_models.build(folders[family], torch.float32, "cuda")
    nats, gradients = fused_models.nats_and_gradients(model, fused_models.with_places(tiny_models.batch()))
    reference = fused_models.build_reference(folders[family], "cuda")
    exact_nats, exact = fused_models.nats_and_gradients(reference, tiny_models.batch())
    assert nats == pytest.approx(exact_nats, rel=1e-5)
    assert fused_models.error(gradients, exact) < 1e-4


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_gradients_with_dora_are_those_of_peft_in_float64(folders, family):
    model = fused_models.build(folders[family], torch.float32, "cuda", lora_variant="dora")
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    reference = fused_models.build_reference(folders[family], "cuda", lora_variant="dora")
    exact_nats, exact = fused_models.nats_and_gradients(reference, tiny_models.batch())
    assert nats == pytest.approx(exact_nats, rel=1e-5)
    assert fused_models.error(gradients, exact) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2"])
def test_gradients_with_dropout_are_those_of_peft_with_the_same_masks(folders, family):
    torch.manual_seed(7)
    model = fused_models.build(folders[family], torch.float32, "cuda", lora_dropout=0.3)
    torch.manual_seed(7)
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    reference = fused_models.build_reference(folders[family], "cuda")
    exact_nats, exact = fused_models.nats_and_gradients(
        fused_models.with_masks_of_fused(reference, 0.3, 7), tiny_models.batch()
    )
    assert nats == pytest.approx(exact_nats, rel=1e-5)
    assert fused_models.error(gradients, exact) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_rounding_in_16_bit_is_no_worse_than_pefts(folders, family, dtype):
    fused, plain = (fused_models.build(folders[family], dtype, "cuda", fused=fused) for fused in (True, False))
    reference = fused_models.build_reference(folders[family], "cuda")
    assert fused_models.rounding(fused, reference) < 1.25 * fused_models.rounding(plain, reference)


@pytest.mark.parametrize("level", Keep)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "gpt2"])
def test_what_is_kept_for_backward_changes_no_bit(folders, family, variant, level):
    model = fused_models.build(folders[family], torch.bfloat16, "cuda", lora_variant=variant)
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    keep(model, Choice((level,) * 2))
    for _ in range(2):
        again, others = fused_models.nats_and_gradients(model, tiny_models.batch())
        assert again == nats
        assert all(torch.equal(gradients[name], others[name]) for name in gradients)


@pytest.mark.parametrize("level", Keep)
@pytest.mark.parametrize("batch", [tiny_models.batch, fused_models.packed_batch])
@pytest.mark.parametrize("family, own", fused_models.OWN_DROPOUT.items())
def test_dropout_of_the_base_itself_is_drawn_again_as_it_was(tmp_path, family, own, batch, level):
    model = fused_models.build(tiny_models.save(family, tmp_path, **own), torch.bfloat16, "cuda", lora_dropout=0.3)
    found = []
    for one in (Keep.ALL, level):
        keep(model, Choice((one,) * 2))
        torch.manual_seed(7)
        found.append(fused_models.nats_and_gradients(model, batch()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], value) for name, value in found[1][1].items())


@pytest.mark.bites("model.attention.FLASH")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("heads, few, window", [(8, 2, None), (6, 6, None), (8, 2, 100)])
@pytest.mark.parametrize("num_shared", [None, [0, 20, 0, 0, 0, 150]])
def test_samples_of_a_row_are_kept_apart_by_flash_attention_and_without_it(
    dtype, heads, few, window, num_shared, has_sinks, caplog
):
    from qlora_ray.model import attention

    attention._say_once.cache_clear()
    borders = torch.tensor([0, 37, 300, 301, 512, 700, 1024], dtype=torch.int32)
    shared = None if num_shared is None else torch.tensor(num_shared)
    mask = attention.mask_of_borders(borders, torch.device("cuda"), shared)
    parts = [random(2, 512, count, 64, dtype=dtype).transpose(1, 2).requires_grad_() for count in (heads, few, few)]
    grad = random(2, 512, heads, 64, dtype=dtype).transpose(1, 2)
    sight = attention.Sight(0.125, window, random(heads, dtype=torch.float32) if has_sinks else None)
    with caplog.at_level("INFO"):
        output = attention.attend(*parts, mask, sight)
    assert ("no FlashAttention" in caplog.text) == (dtype == torch.float32)
    exact_parts = [part.detach().double().requires_grad_() for part in parts]
    exact = attention.attend(*exact_parts, attention.dense_mask(mask, 2, 512, sight), sight)
    assert_close(output, exact, dtype)
    for ours, plain in zip(
        torch.autograd.grad(output, parts, grad), torch.autograd.grad(exact, exact_parts, grad.double()), strict=True
    ):
        assert_close(ours, plain, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2"])
def test_packed_samples_are_those_in_rows_of_their_own(folders, family, dtype):
    model = fused_models.build(folders[family], dtype, "cuda")
    packed = fused_models.packed_batch()
    nats, gradients = fused_models.nats_and_gradients(model, packed)
    exact_nats, exact = fused_models.alone(fused_models.build_reference(folders[family], "cuda"), packed)
    assert nats == pytest.approx(exact_nats, rel=1e-5 if dtype == torch.float32 else 5e-3)
    rounding = fused_models.error(fused_models.alone(model, packed)[1], exact)
    assert fused_models.error(gradients, exact) < max(1e-4, 1.25 * rounding)
