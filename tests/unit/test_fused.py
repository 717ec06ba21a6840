"""The fused arithmetic is PEFT's on bitsandbytes: values, gradients, names, and what it leaves to PEFT."""

import functools

import pytest
import torch
from peft import PeftModel

from qlora_ray.model.adapter import trainable
from qlora_ray.model.dropout import MASK_32, drop_of, kept, pcg
from qlora_ray.model.families import FAMILIES
from qlora_ray.model.fused import fuse, fused_layers, keep, leaf_modules
from qlora_ray.model.layer import NUM_TOGETHER, FusedLayer
from qlora_ray.model.recompute import Choice, Keep
from qlora_ray.worker.loss import sum_of_nats
from tests import fused_models
from tests.integration import tiny_models

FUSED = tuple(FAMILIES)
PLAIN = ("gemma2", "gpt_neox", "opt", "falcon")  # of their layers the projections alone are fused
# float32 sums in another order differ by 1e-7 to 1e-6 of a loss, of a gradient's norm or of the largest logit. A term
# that is left out, counted twice or in the wrong row is worth 1e-3 and more: hence 1e-6 and 1e-5 below.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: fused_models.save(family, tmp_path_factory.mktemp(family)) for family in (*FUSED, *PLAIN)}


@pytest.mark.bites("model.fused.LORA_LAYERS")
@pytest.mark.parametrize("family", [*FUSED, *PLAIN])
def test_gradients_are_those_of_peft_in_float64(folders, family):
    nats, gradients = fused_models.nats_and_gradients(
        fused_models.build(folders[family], torch.float32), tiny_models.batch()
    )
    exact_nats, exact = fused_models.nats_and_gradients(
        fused_models.build_reference(folders[family]), tiny_models.batch()
    )
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("level", [Keep.ALL, Keep.HOST])
def test_gradients_with_dropout_are_those_of_peft_with_the_same_masks(folders, family, level):
    model = fused_models.build(folders[family], torch.float32, lora_dropout=0.3)
    keep(model, Choice((level,) * 2))
    torch.manual_seed(7)
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    reference = fused_models.with_masks_of_fused(fused_models.build_reference(folders[family]), 0.3, 7)
    exact_nats, exact = fused_models.nats_and_gradients(reference, tiny_models.batch())
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5
    torch.manual_seed(8)
    assert fused_models.nats_and_gradients(model, tiny_models.batch())[0] != nats
    without = fused_models.nats_and_gradients(fused_models.build_reference(folders[family]), tiny_models.batch())[0]
    assert fused_models.nats_and_gradients(model.eval(), tiny_models.batch())[0] == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ranks_that_are_no_multiple_of_8_leave_rows_where_products_are_fast(folders, family, dropout):
    settings = {"lora_r": 3, "rank_pattern": {"down_proj": 5}, "lora_alpha": 7}
    settings |= {} if family == "llama" else {"rank_pattern": {}}
    model = fused_models.build(folders[family], torch.float32, lora_dropout=dropout, **settings)
    assert all((group.inputs + group.rank) % 8 == 0 for one in fused_layers(model) for group in (one.qkv, one.down))
    torch.manual_seed(7)
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    reference = fused_models.build_reference(folders[family], **settings)
    exact_nats, exact = fused_models.nats_and_gradients(
        fused_models.with_masks_of_fused(reference, dropout, 7), tiny_models.batch()
    )
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("level, dropout", [(Keep.ALL, 0.0), (Keep.ALL, 0.3), (Keep.PRODUCTS, 0.0), (Keep.HOST, 0.3)])
def test_places_without_a_label_are_left_out_where_they_cannot_matter(folders, family, level, dropout, monkeypatch):
    rows = []
    plain = FusedLayer.mlp_part
    monkeypatch.setattr(FusedLayer, "mlp_part", lambda *some: rows.append(len(some[1].x1)) or plain(*some))
    model = fused_models.build(folders[family], torch.float32, lora_dropout=dropout)
    keep(model, Choice((level,) * 2))
    batch = fused_models.with_places(tiny_models.batch())
    torch.manual_seed(7)
    nats, gradients = fused_models.nats_and_gradients(model, batch)
    passes_rows = FAMILIES[family].passes_rows
    # Two rows of 24, of which 16 are trained on.
    assert rows == [48, 32 if passes_rows else 48] and len(batch["label_places"]) == 32
    reference = fused_models.build_reference(folders[family])
    fused_models.with_masks_of_fused(reference, dropout, 7, batch["label_places"] if passes_rows else None)
    exact_nats, exact = fused_models.nats_and_gradients(reference, tiny_models.batch())
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5


@pytest.mark.parametrize("family", ["llama", "granite", "olmo2", "glm4", "qwen3_moe"])
@pytest.mark.parametrize("level, dropout", [(Keep.ALL, 0.0), (Keep.HOST, 0.3)])
def test_rows_of_zeros_behind_those_with_a_label_change_no_bit(folders, family, level, dropout, monkeypatch):
    rows, plain = [], FusedLayer.mlp_part
    monkeypatch.setattr(FusedLayer, "mlp_part", lambda *some: rows.append(len(some[1].x1)) or plain(*some))
    model = fused_models.build(folders[family], torch.float32, lora_dropout=dropout)
    keep(model, Choice((level,) * 2))
    found = []
    for together in (1, 20):
        monkeypatch.setitem(NUM_TOGETHER, "cpu", together)
        torch.manual_seed(7)
        found.append(fused_models.nats_and_gradients(model, fused_models.with_places(tiny_models.batch())))
    # Of zeros there are none where they would be routed to experts.
    assert rows == [48, 32, 48, 32 if family == "qwen3_moe" else 40]
    (nats, gradients), (more_nats, more) = found
    assert nats == more_nats
    assert all(torch.equal(more[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("level", [Keep.ALL, Keep.ATTENTION, Keep.HOST])
@pytest.mark.parametrize("family", fused_models.OWN_DROPOUT)
def test_dropout_of_the_base_itself_is_transformers_with_the_same_masks(tmp_path, family, level):
    folder = tiny_models.save(family, tmp_path, **fused_models.OWN_DROPOUT[family])
    model = fused_models.build(folder, torch.float32, lora_dropout=0.3)
    assert len(fused_layers(model)) == 2
    keep(model, Choice((level,) * 2))
    torch.manual_seed(7)
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    place = torch.get_rng_state()
    reference = fused_models.with_masks_of_fused(fused_models.build_reference(folder), 0.3, 7)
    torch.manual_seed(7)  # of embedding and attention
    exact_nats, exact = fused_models.nats_and_gradients(reference, tiny_models.batch())
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5
    assert torch.equal(torch.get_rng_state(), place)  # attention that was computed again took nothing


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_dropout_of_the_base_itself_is_off_in_evaluation(tmp_path, family):
    folder = tiny_models.save(family, tmp_path, **fused_models.OWN_DROPOUT[family])
    fused, plain = (fused_models.build(folder, torch.float32, fused=fused).eval() for fused in (True, False))
    nats, exact = (fused_models.nats_and_gradients(one, tiny_models.batch())[0] for one in (fused, plain))
    assert nats == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("more", "num_fused"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, 2),
        ({"scale_attn_weights": False}, 2),
        ({"n_inner": 96}, 2),
        ({"reorder_and_upcast_attn": True}, 0),
        ({"add_cross_attention": True}, 0),
        ({"activation_function": "relu"}, 0),
    ],
)
def test_what_a_gpt2_may_have_of_its_own_is_computed_or_left_to_peft(tmp_path, more, num_fused):
    folder = tiny_models.save("gpt2", tmp_path, **more, **fused_models.SETTINGS["gpt2"])
    model = fused_models.build(folder, torch.float32)
    assert len(fused_layers(model)) == num_fused
    reference = fused_models.build_reference(folder)
    for one in (model, reference):  # of cross attention nothing is used, and nothing learns
        for name, parameter in one.named_parameters():
            parameter.requires_grad = parameter.requires_grad and "crossattention" not in name
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    exact_nats, exact = fused_models.nats_and_gradients(reference, tiny_models.batch())
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5


@pytest.mark.parametrize("family", sorted({*PLAIN} - {"opt"}))  # which draws dropout of its own from the same generator
def test_projections_outside_fused_layers_have_a_mask_each(folders, family):
    model = fused_models.build(folders[family], torch.float32, lora_dropout=0.3)
    torch.manual_seed(7)
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    reference = fused_models.with_a_mask_each(fused_models.build_reference(folders[family]), 0.3, 7)
    exact_nats, exact = fused_models.nats_and_gradients(reference, tiny_models.batch())
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5


def test_masks_are_those_of_the_hash_by_the_place():
    drop = drop_of(0.3, 2**40 + 3, 17)
    mask = kept(5, 7, drop, torch.device("cpu"))
    for row in range(5):
        for column in range(7):
            word = pcg(pcg(row ^ drop.key) ^ pcg((column // 2) ^ (~drop.key & MASK_32)))
            assert bool(mask[row, column]) == ((word >> 16 * (column % 2)) & 0xFFFF >= drop.threshold)


def test_masks_keep_the_share_that_was_asked_for_and_differ_by_seed_and_place():
    for probability in (0.05, 0.1, 0.5):
        mask = kept(512, 1001, drop_of(probability, 3, 5), torch.device("cpu")).double()
        variance = probability * (1 - probability)
        assert abs(float(mask.mean()) - (1 - probability)) < 4 * (variance / mask.numel()) ** 0.5
        for means, each in ((mask.mean(1), 1001), (mask.mean(0), 512)):
            assert 0.8 < float(means.std()) / (variance / each) ** 0.5 < 1.2
    masks = [kept(64, 64, drop_of(0.5, seed, place), torch.device("cpu")) for seed, place in ((1, 1), (1, 2), (2, 1))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < float((masks[a] == masks[b]).double().mean()) < 0.6


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", [*FUSED, "gemma2", "opt"])
def test_rounding_in_bfloat16_is_no_worse_than_pefts(folders, family, variant):
    fused, plain = (
        fused_models.build(folders[family], torch.bfloat16, fused=fused, lora_variant=variant)
        for fused in (True, False)
    )
    reference = fused_models.build_reference(folders[family], lora_variant=variant)
    assert fused_models.rounding(fused, reference) < 1.25 * fused_models.rounding(plain, reference)


@pytest.fixture(scope="module")
def keeping_all(folders):
    """A model, and its nats and gradients where it keeps all: made once for all levels."""

    @functools.cache
    def made(family: str, variant: str):
        model = fused_models.build(folders[family], torch.bfloat16, lora_variant=variant)
        return model, *fused_models.nats_and_gradients(model, tiny_models.batch())

    return made


@pytest.mark.parametrize("level", Keep)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("family", FUSED)
def test_what_is_kept_for_backward_changes_no_bit(keeping_all, family, variant, level):
    model, nats, gradients = keeping_all(family, variant)
    keep(model, Choice((level,) * 2))
    again, others = fused_models.nats_and_gradients(model, tiny_models.batch())
    assert again == nats
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_weights_held_dequantized_change_no_bit(folders):
    model = fused_models.build(folders["llama"], torch.bfloat16)
    before = fused_models.nats_and_gradients(model, tiny_models.batch())[1]
    keep(model, Choice((Keep.ALL,) * 2, num_holding_weights=2))
    for _ in range(2):  # the first pass fills, the second reads
        after = fused_models.nats_and_gradients(model, tiny_models.batch())[1]
        assert all(torch.equal(before[name], after[name]) for name in before)
    for parameter in trainable(model).values():
        parameter.data.mul_(1.5)  # an optimizer step: held weights must not hold the LoRA
    fresh = fused_models.build(folders["llama"], torch.bfloat16)
    for name, parameter in trainable(fresh).items():
        parameter.data.copy_(trainable(model)[name])
    expected = fused_models.nats_and_gradients(fresh, tiny_models.batch())[1]
    after = fused_models.nats_and_gradients(model, tiny_models.batch())[1]
    assert all(torch.equal(expected[name], after[name]) for name in expected)


def test_gradients_pass_from_layer_to_layer_without_a_copy(folders, monkeypatch):
    plain, is_handed_on = FusedLayer.with_room, []

    def with_room(layer, dy):
        buffer = plain(layer, dy)
        is_handed_on.append(buffer.data_ptr() == dy.data_ptr())
        return buffer

    monkeypatch.setattr(FusedLayer, "with_room", with_room)
    model = fused_models.build(folders["llama"], torch.bfloat16)
    for _ in range(2):
        fused_models.nats_and_gradients(model, tiny_models.batch())
    assert is_handed_on == [True, True] * 2  # the last layer's from the final norm


def test_partly_adapted_layers_are_fused_too(folders):
    adapted = {"target_modules": ["q_proj", "up_proj"]}
    model = fused_models.build(folders["llama"], torch.float32, **adapted)
    assert len(fused_layers(model)) == 2
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    exact_nats, exact = fused_models.nats_and_gradients(
        fused_models.build_reference(folders["llama"], **adapted), tiny_models.batch()
    )
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5


def test_parameter_names_and_state_dict_stay_pefts(folders, tmp_path):
    fused = fused_models.build(folders["llama"], torch.float32)
    plain = fused_models.build(folders["llama"], torch.float32, fused=False)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    fused.save_pretrained(tmp_path)
    base = fused_models.build(folders["llama"], torch.float32, fused=False).unload()
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    assert tiny_models.difference(tiny_models.logits(fused), tiny_models.logits(reloaded)) < 1e-5


@pytest.mark.bites("model.fused.LORA_LAYERS")
def test_generation_and_disabled_adapters_take_pefts_own_path(folders):
    fused = fused_models.build(folders["llama"], torch.float32).eval()
    plain = fused_models.build(folders["llama"], torch.float32, fused=False).eval()
    prompt = {"input_ids": tiny_models.batch()["input_ids"], "do_sample": False, "max_new_tokens": 8, "use_cache": True}
    assert torch.equal(fused.generate(**prompt), plain.generate(**prompt))
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(tiny_models.logits(fused), tiny_models.logits(plain))


def test_what_the_fused_path_cannot_do_is_left_to_peft_with_a_line(folders, caplog):
    model = fused_models.build(folders["llama"], torch.float32, fused=False, lora_variant="dora", lora_dropout=0.1)
    with caplog.at_level("INFO"):
        line = fuse(model)
    assert line in caplog.text
    assert line == "fused: 0 decoder layers, 0 other projections; left to PEFT: 14 x it is DoRA with dropout"
    assert leaf_modules(model) == []


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
@pytest.mark.parametrize("family", [*FUSED, *PLAIN])
def test_gradients_with_dora_are_those_of_peft_in_float64(folders, family, targets):
    if targets != "all-linear" and family != "llama":
        pytest.skip("partly adapted layers: one family is enough")
    dora = {"lora_variant": "dora", "target_modules": targets}
    model = fused_models.build(folders[family], torch.float32, **dora)
    assert bool(fused_layers(model)) == (family in FUSED)
    nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
    assert any("lora_magnitude_vector" in name for name in gradients)
    exact_nats, exact = fused_models.nats_and_gradients(
        fused_models.build_reference(folders[family], **dora), tiny_models.batch()
    )
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5


@pytest.mark.parametrize("family", FUSED)
def test_places_without_a_label_are_left_out_with_dora_too(folders, family):
    nats, gradients = fused_models.nats_and_gradients(
        fused_models.build(folders[family], torch.float32, lora_variant="dora"),
        fused_models.with_places(tiny_models.batch()),
    )
    exact_nats, exact = fused_models.nats_and_gradients(
        fused_models.build_reference(folders[family], lora_variant="dora"), tiny_models.batch()
    )
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5


def test_lengths_of_dora_follow_the_weights_of_each_step(folders):
    model, reference = (build(folders["llama"], *some, lora_variant="dora") for build, some in (
        (fused_models.build, (torch.float32,)), (fused_models.build_reference, ())
    ))  # fmt: skip
    for _ in range(2):
        nats, gradients = fused_models.nats_and_gradients(model, tiny_models.batch())
        exact_nats, exact = fused_models.nats_and_gradients(reference, tiny_models.batch())
        assert nats == pytest.approx(exact_nats, rel=1e-6)
        assert fused_models.error(gradients, exact) < 1e-5
        for trained in (trainable(model), trainable(reference)):
            for parameter in trained.values():  # an optimizer step
                parameter.data.mul_(1.5)


def test_padding_on_the_right_needs_no_mask(folders):
    model = fused_models.build(folders["llama"], torch.float32)
    batch = tiny_models.batch()
    padded = {name: torch.nn.functional.pad(values, (0, 8), value=5) for name, values in batch.items()}
    padded["labels"][:, 24:] = -100
    nats, gradients = fused_models.nats_and_gradients(model, batch)
    nats_padded, gradients_padded = fused_models.nats_and_gradients(model, padded)
    assert nats_padded == pytest.approx(nats, rel=1e-6)
    assert fused_models.error(gradients_padded, gradients) < 1e-5


@pytest.mark.parametrize("family", FUSED)
def test_packed_samples_are_those_in_rows_of_their_own(folders, family):
    model = fused_models.build(folders[family], torch.float32)
    packed = fused_models.packed_batch()
    batches = [packed]
    if family != "gpt_oss":  # whose masks transformers makes without a look at positions: nobody but us packs it
        batches += [{name: values for name, values in packed.items() if name != "sample_borders"}]
    nats, gradients = fused_models.alone(model, packed)
    for found in (fused_models.nats_and_gradients(model, batch) for batch in batches):
        assert found[0] == pytest.approx(nats, rel=1e-6)
        assert fused_models.error(found[1], gradients) < 1e-5


@pytest.mark.bites("model.attention.OWN_MASK")
def test_borders_reach_the_layers_and_make_pefts_mask_where_adapters_are_off(folders, monkeypatch):
    from qlora_ray.model import attention

    model, seen, packed = fused_models.build(folders["llama"], torch.float32), [], fused_models.packed_batch()
    plain = attention._attend_one_by_one
    monkeypatch.setattr(attention, "_attend_one_by_one", lambda *some: seen.append(some[3].shape) or plain(*some))
    with torch.no_grad():
        sum_of_nats(model, packed)
        assert seen == [(1, 1, 20, 6)] * 2  # the longest sample, and one border more than there are samples
        with model.disable_adapter():
            by_borders = sum_of_nats(model, fused_models.packed_batch())
            by_mask = sum_of_nats(
                model, {n: v for n, v in fused_models.packed_batch().items() if n != "sample_borders"}
            )
    assert len(seen) == 2
    assert torch.equal(by_borders, by_mask)


@pytest.mark.bites("model.attention.OWN_MASK")
def test_rows_of_one_sample_need_no_look_for_packed_ones(folders, monkeypatch):
    from transformers import masking_utils

    model = fused_models.build(folders["llama"], torch.float32)
    by_mask = fused_models.nats_and_gradients(model, tiny_models.batch() | {"position_ids": torch.arange(24)[None]})
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", None)
    without = fused_models.nats_and_gradients(model, tiny_models.batch())
    assert without[0] == by_mask[0]
    assert all(torch.equal(without[1][name], value) for name, value in by_mask[1].items())


@pytest.mark.parametrize("rows", [tiny_models.batch, fused_models.packed_batch])
def test_samples_longer_than_a_sliding_window_see_its_tokens(tmp_path, rows):
    folder = tiny_models.save("mistral", tmp_path, sliding_window=9)
    model = fused_models.build(folder, torch.float32)
    nats, gradients = fused_models.nats_and_gradients(model, rows())
    exact_nats, exact = fused_models.nats_and_gradients(fused_models.build_reference(folder), rows())
    assert nats == pytest.approx(exact_nats, rel=1e-6)
    assert fused_models.error(gradients, exact) < 1e-5
    with model.disable_adapter(), torch.no_grad():  # transformers' own path, with a mask of ours
        by_borders = float(sum_of_nats(model, rows()))
        model.get_base_model().takes_borders = False
        assert by_borders == pytest.approx(float(sum_of_nats(model, rows())), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "more", "window"),
    [
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 0}, 0),
        ("llama", {}, None),
        ("qwen2", {"sliding_window": 9}, None),  # which use_sliding_window leaves out
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, 9),
        ("qwen2", {"sliding_window": 0, "use_sliding_window": True, "max_window_layers": 1}, 0),
    ],
)
def test_sliding_window_is_read_as_transformers_reads_it(tmp_path, family, more, window):
    folder = tiny_models.save(family, tmp_path, **more)
    fused, plain = (fused_models.build(folder, torch.float32, fused=fused) for fused in (True, False))
    layers = fused_layers(fused)
    assert layers[-1].sight.window == window if window != 0 else len(layers) < 2
    for batch in (tiny_models.batch(), fused_models.packed_batch()):
        nats, gradients = fused_models.nats_and_gradients(fused, batch)
        exact_nats, exact = fused_models.nats_and_gradients(plain, batch)
        assert nats == pytest.approx(exact_nats, rel=1e-6)
        # All together: where nothing is attended to, those of queries and keys are rounding alone.
        ours, theirs = (torch.cat([one[name].flatten() for name in exact]) for one in (gradients, exact))
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
