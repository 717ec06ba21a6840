"""Bases that only look like what is trained on here are refused before a worker starts; odd ones work."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from qlora_ray.config import base_model_path
from qlora_ray.data.stats import DataStats
from qlora_ray.errors import ConfigError
from qlora_ray.model.adapter import add_adapter, trainable
from qlora_ray.model.base import load_base
from qlora_ray.model.facts import RopeLimit, read_facts
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import make_plan
from qlora_ray.planning.rows import layout
from tests.integration import many_runs, tiny_models

CPU = torch.device("cpu")
EMBEDDED = base_model_path("embedded")
TEXT = {**tiny_models.SIZES, "head_dim": 16}
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
)  # fmt: skip
SSM = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16)
LINEAR = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
HYBRIDS = {
    "qwen3_next": dict(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1,
        shared_expert_intermediate_size=32, num_hidden_layers=4, **LINEAR,
    ),
    "qwen3_5_text": dict(head_dim=16, num_hidden_layers=4, **LINEAR),
    "falcon_h1": dict(head_dim=16, mamba_d_ssm=128, mamba_expand=2, **SSM),
    "nemotron_h": dict(
        mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2, head_dim=16, num_hidden_layers=4,
        hybrid_override_pattern="M*-M",
    ),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"], num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=64, **SSM,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_multiple_of=16),
    "mamba2": dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, expand=2),
}  # fmt: skip


def save(folder: Path, family: str, **sizes) -> str:
    """A random model of any family, with the embedded base's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**tiny_models.SIZES, **sizes}))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return str(folder)


def refusal(folder: str) -> str:
    with pytest.raises(ConfigError) as caught:
        exact_facts(tiny_models.make_config(folder))
    return str(caught.value)


def planned(folder: str, longest_row: int, **training):
    config = tiny_models.make_config(folder, training={"batch_size": 1, **training})
    data = DataStats("0" * 32, 100, 0, 0, 100, 10, 1000, 500, longest_row)
    return make_plan(config, data, exact_facts(config), Hardware(4, 0), None)


def test_encoder_decoder_as_base_is_refused(tmp_path, refused):
    small = T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=2048)
    T5ForConditionalGeneration(small).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path)
    assert "t5: it is no causal language model" in refusal(str(tmp_path))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_encoder_whose_tokens_see_the_future_is_refused_unless_it_is_a_decoder(tmp_path, family):
    small = {"num_key_value_heads": None, "max_position_embeddings": 128}
    assert f"{family}: it is no causal language model" in refusal(save(tmp_path / "bert", family, **small))
    assert exact_facts(tiny_models.make_config(save(tmp_path / "decoder", family, is_decoder=True, **small)))


def test_tokenizer_that_this_version_cannot_read_is_refused_by_the_driver(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "base")
    file = Path(folder) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"] |= {"type": "NewBPE", "merges": [{"a": 1}]}
    file.write_text(json.dumps(tokenizer))
    asked = (f"model.base_model={folder}", f"ray.storage_path={tmp_path / 'runs'}", "ray.num_workers=1")
    message = many_runs.refused(*asked)
    assert f"model.base_model={folder}: no usable tokenizer: data did not match" in message


def test_pad_token_without_a_row_in_the_embedding_does_not_end_a_padded_run(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id >= read_facts(folder).num_embeddings
    ended = many_runs.run(
        f"model.base_model={folder}", "training.packing=false", "training.max_steps=1", "training.max_length=128",
        "evaluation.num_prompts=3", "evaluation.max_new_tokens=2", f"ray.storage_path={tmp_path}", "ray.run_name=r",
        "ray.num_workers=1",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def test_prompts_without_room_for_an_answer_are_shortened_or_left_out_with_a_note(tmp_path):
    folder = tiny_models.save("gpt2", tmp_path / "base")
    records = [{"prompt": f"say {n} " + "7 " * (30 + 4 * (n % 20)), "completion": f"{n} it is"} for n in range(60)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ended = many_runs.run(
        f"model.base_model={folder}", f"data.train_file={tmp_path / 'r.jsonl'}", "data.max_bad_fraction=1",
        "training.max_length=128", "training.max_steps=1", "evaluation.num_prompts=4", f"ray.storage_path={tmp_path}",
        "ray.run_name=r", "ray.num_workers=1",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "the base's context of 128 tokens" in " ".join(ended.stdout.split())


def test_rows_beyond_learned_positions_are_refused_with_what_fits(tmp_path):
    folder = tiny_models.save("gpt2", tmp_path)
    assert read_facts(folder).num_positions == 128
    with pytest.raises(ConfigError, match=r"has learned 128 positions. Use training.max_length=128"):
        planned(folder, longest_row=200, max_length=512)
    assert planned(folder, longest_row=128, max_length=512).num_steps > 0


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
          "original_max_position_embeddings": 32, "rope_theta": 1e4}, RopeLimit("longrope", 32)),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, RopeLimit("dynamic", 128)),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, None),
    ],
)  # fmt: skip
def test_positions_from_which_rope_depends_on_the_row_are_known(tmp_path, rope, limit):
    phi3 = {"family": "phi3", "original_max_position_embeddings": 32}
    folder = save(tmp_path, **(phi3 if rope["rope_type"] == "longrope" else {"family": "llama"}), rope_parameters=rope)
    assert read_facts(folder).rope_limit == limit
    below = limit.num_tokens if limit else 64
    assert planned(folder, longest_row=below, max_length=below).num_steps > 0


def test_longrope_beyond_its_first_context_has_one_sample_a_row_and_one_row_a_batch(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
    folder = save(tmp_path, "phi3", rope_parameters={**rope, "original_max_position_embeddings": 32},
                  original_max_position_embeddings=32)  # fmt: skip
    config = tiny_models.make_config(folder, training={"max_length": 64})
    assert layout(tiny_models.make_config(folder, training={"max_length": 32}), read_facts(folder)).packing
    assert not layout(config, read_facts(folder)).packing
    assert any("Rows hold one sample each" in note for note in planned(folder, longest_row=64, max_length=64).notes)
    with pytest.raises(ConfigError, match=r"training.batch_size=4: .*longrope.*training.batch_size=1"):
        planned(folder, longest_row=64, max_length=64, batch_size=4)
    # What the refusal is for: a long row changes a short one of its batch, alone in its batch it does not.
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    short, long = (torch.randint(3, 2048, (1, n), generator=torch.Generator().manual_seed(n)) for n in (20, 48))
    with torch.no_grad():
        alone = model(input_ids=short, use_cache=False).logits
        beside = model(input_ids=torch.cat([torch.nn.functional.pad(short, (0, 28)), long]), use_cache=False).logits
        again = model(input_ids=short, use_cache=False).logits
    assert torch.equal(alone, again) and not torch.allclose(alone[0], beside[0, :20], atol=1e-4)


def test_dynamic_rope_beyond_its_context_is_refused_since_earlier_rows_change_it(tmp_path):
    folder = save(tmp_path, "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ConfigError, match=r"dynamic.*Use training.max_length=128"):
        planned(folder, longest_row=200, max_length=256)


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_are_planned_adapted_and_their_batch_is_the_sum_of_its_samples(tmp_path, family):
    folder = save(tmp_path, family, **HYBRIDS[family])
    config = tiny_models.make_config(folder, quantization={"type": "none"})
    facts = exact_facts(config)
    assert not layout(config, facts).packing
    base = load_base(config.model, config.quantization, "float32", CPU)
    model = add_adapter(base, config.model, torch.float32, 0)
    adapted = {name.split(".")[-4] for name in trainable(model) if "lora_A" in name}
    left_out = family in ("falcon_h1", "nemotron_h", "mamba2")
    assert adapted and ("out_proj" in adapted) != left_out
    notes = planned(folder, longest_row=64, max_length=64).notes
    assert any("all-linear leaves out out_proj" in note for note in notes) == left_out
    assert facts.num_trainable_parameters == sum(one.numel() for one in trainable(model).values())
    model.eval()
    rows = [torch.randint(3, 2048, (n,), generator=torch.Generator().manual_seed(n)) for n in (11, 13)]
    together = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        padded = model(input_ids=together, use_cache=False).logits
        for number, row in enumerate(rows):
            alone = model(input_ids=row[None], use_cache=False).logits[0]
            assert tiny_models.difference(padded[number, : len(row)], alone) < 1e-5


def test_layer_that_peft_refuses_is_told_with_the_way_out(tmp_path):
    folder = save(tmp_path, "mamba2", **HYBRIDS["mamba2"])
    config = tiny_models.make_config(folder, model={"target_modules": ["in_proj", "out_proj"]})
    base = load_base(config.model, config.quantization, "float32", CPU)
    with pytest.raises(ConfigError, match=r"model.target_modules=\['in_proj', 'out_proj'\].*remove it"):
        add_adapter(base, config.model, torch.float32, 0)


def vision_language(folder: Path, family: str) -> str:
    """A tiny model with a vision tower."""
    torch.manual_seed(0)
    text = {name: value for name, value in TEXT.items() if family == "gemma3" or name != "head_dim"}
    config = AutoConfig.for_model(family, text_config=text, vision_config=VISION)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_vision_language_folder_is_refused_and_its_text_model_alone_is_a_base(tmp_path, family):
    folder = vision_language(tmp_path / "whole", family)
    assert f"{family} has vision or audio parts beside its text model" in refusal(folder)
    # As docs/bases.md says.
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    text.save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "text")
    config = tiny_models.make_config(str(tmp_path / "text"), quantization={"type": "none"})
    ours = load_base(config.model, config.quantization, "float32", CPU)
    ids = tiny_models.batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)
