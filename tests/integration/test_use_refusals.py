"""Bad input at the doors to a trained adapter: exit code 2, one message that names what and why; and the GGUF door."""

import json
import shutil

import pytest

from qlora_ray import evaluate, export, generate
from qlora_ray.config import base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.model.record import FILE
from tests.integration import adapters, tiny_models

EMBEDDED = base_model_path("embedded")


def test_missing_adapter(refused, tmp_path):
    assert "no such folder" in refused(generate, "--adapter", tmp_path / "no", "--prompt", "x")
    assert "holds no adapter" in refused(evaluate, "--adapter", tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert "this run has no adapter yet" in refused(generate, "--adapter", tmp_path, "--prompt", "x")


def test_adapter_without_its_record(refused, copied):
    (copied / FILE).unlink()
    assert f"no {FILE}, which says how its base was quantized" in refused(
        generate, "--adapter", copied, "--prompt", "x"
    )


def test_record_of_a_later_layout(refused, copied):
    record = json.loads((copied / FILE).read_text())
    (copied / FILE).write_text(json.dumps({**record, "layout": 99}))
    assert "has layout 99; this version reads layout 1" in refused(generate, "--adapter", copied, "--prompt", "x")


@pytest.mark.parametrize("door, more", [(generate, ["--prompt", "x"]), (evaluate, []), (export, ["--to", "merged"])])
def test_adapter_of_another_base_of_the_same_shape(refused, trained, tmp_path, door, more):
    other = tmp_path / "other"
    shutil.copytree(EMBEDDED, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-4000:] = bytes(4000)  # the same names, shapes and sizes
    (other / "model.safetensors").write_bytes(content)
    output = ["--output", tmp_path / "out"] if door is export else []
    message = refused(door, "--adapter", trained, "--base", other, *more, *output)
    assert "was trained on another base than" in message and "--base" in message


def test_missing_base(refused, copied, tmp_path):
    record = json.loads((copied / FILE).read_text())
    record["base"]["base_model"] = "/gone/base"
    (copied / FILE).write_text(json.dumps(record))
    message = refused(generate, "--adapter", copied, "--prompt", "x")
    assert "its base /gone/base=/gone/base: no such folder" in message
    assert "no such folder" in refused(generate, "--adapter", copied, "--base", tmp_path / "no", "--prompt", "x")
    assert generate.main(["--adapter", str(copied), "--base", EMBEDDED, "--prompt", "x", "max_new_tokens=1"]) == 0


@pytest.mark.parametrize("how", ["cut off", "no tensors", "header", "missing"])
def test_corrupted_adapter_weights(refused, copied, how):
    weights = copied / "adapter_model.safetensors"
    content = weights.read_bytes()
    damaged = {"cut off": content[:-100], "no tensors": b"\x02" + bytes(7) + b"{}", "header": b"\xff" * 40}
    if how == "missing":
        weights.unlink()
    else:
        weights.write_bytes(damaged[how])
    expected = {"no tensors": "holds no LoRA matrices", "missing": "is missing"}.get(how, "is damaged")
    assert expected in refused(generate, "--adapter", copied, "--prompt", "x")


def test_corrupted_base(refused, trained, tmp_path):
    base = shutil.copytree(EMBEDDED, tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "tensors cut off" in refused(evaluate, "--adapter", trained, "--base", base)


def test_tokenizer_of_another_model(refused, copied):
    template = (copied / "chat_template.jinja").read_text()
    (copied / "chat_template.jinja").write_text(template.replace("<|", "<||"))
    assert "its tokenizer is not the one it was trained with" in refused(generate, "--adapter", copied, "--prompt", "x")


def test_adapter_shapes_that_do_not_fit(refused, trained, tmp_path):
    other = adapters.trained(tmp_path / "run", tiny_models.save("llama", tmp_path / "base"), steps=1)
    mixed = shutil.copytree(trained, tmp_path / "mixed")
    shutil.copy(other / "adapter_model.safetensors", mixed)
    assert "does not fit its base: " in refused(generate, "--adapter", mixed, "--prompt", "x")


def test_prompt_longer_than_the_context(refused, trained):
    message = refused(generate, "--adapter", trained, "--prompt", "word " * 2000)
    assert "tokens; with max_new_tokens=1 that is more than the model's context of 1,024" in message


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("temprature=1", "Did you mean temperature?"),
        ("max_new_tokens=0", "must be a whole number of at least 1"),
        ("max_new_tokens=x", "must be a whole number of at least 1"),
        ("top_p=2", "must be a number between 1e-06 and 1"),
        ("greedy", "an option is written name=value"),
        ("temperature=-1", "temperature"),
        ("num_beams=0", "num_beams"),
    ],
)
def test_bad_generation_option(refused, trained, option, why):
    assert why in refused(generate, "--adapter", trained, "--prompt", "x", option)


def test_empty_prompt_and_half_a_batch(refused, trained):
    assert "--prompt is empty" in refused(generate, "--adapter", trained, "--prompt", " ")
    assert "go together" in refused(generate, "--adapter", trained, "--input", "x.jsonl")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "holds no row"),
        (b"\xff\n", "not UTF-8 at line 1"),
        (b'[{"prompt": "x"}]', "JSON array"),
    ],
)
def test_unreadable_input_file(refused, trained, tmp_path, content, why):
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_bytes(content)
    assert why in refused(generate, "--adapter", trained, "--input", source, "--output", tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_output_that_is_there_or_has_no_folder(refused, trained, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    assert "is there already" in refused(generate, "--adapter", trained, "--input", source, "--output", source)
    assert "no folder" in refused(generate, "--adapter", trained, "--input", source, "--output", tmp_path / "no" / "x")
    assert "is there already" in refused(export, "--adapter", trained, "--to", "merged", "--output", tmp_path)


def test_adapter_outside_its_run_needs_a_file(refused, copied):
    assert "Name a file of records with --file" in refused(evaluate, "--adapter", copied)


def test_unusable_records(refused, trained, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"}\n')
    message = refused(evaluate, "--adapter", trained, "--file", tmp_path / "bad.jsonl")
    assert "1 of 1 records cannot be used" in message and "no `output` (1x, first: line 1)" in message
    assert "no such file" in refused(evaluate, "--adapter", trained, "--file", tmp_path / "no.jsonl")


def test_missing_lm_eval_is_said_at_once(refused, trained, monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda _: None)
    assert 'pip install "qlora_ray[lm-eval]"' in refused(evaluate, "--adapter", trained, "--tasks", "arc_easy")


def test_gguf_without_llama_cpp(refused, trained, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["--adapter", trained, "--to", "gguf", "--output", tmp_path / "x.gguf"]
    assert "convert_lora_to_gguf.py was not found" in refused(export, *arguments)
    assert "holds no convert_lora_to_gguf.py" in refused(export, *arguments, "--llama-cpp", tmp_path)
    (tmp_path / "convert_lora_to_gguf.py").write_text("raise SystemExit('cannot convert')")
    assert "failed (exit code 1): cannot convert" in refused(export, *arguments, "--llama-cpp", tmp_path)


def test_gguf_hands_over_a_plain_alpha_and_the_right_base(tmp_path):
    adapter = adapters.trained(tmp_path / "run", EMBEDDED, steps=1, lora_variant="rslora", lora_alpha=6)
    script = tmp_path / "convert_lora_to_gguf.py"
    script.write_text(
        "import json, sys\n"
        "config = json.load(open(sys.argv[1] + '/adapter_config.json'))\n"
        "out = sys.argv[sys.argv.index('--outfile') + 1]\n"
        "open(out, 'w').write(json.dumps([config, sys.argv]))\n"
    )
    target = tmp_path / "x.gguf"
    assert (
        export.main(["--adapter", str(adapter), "--to", "gguf", "--output", str(target), "--llama-cpp", str(tmp_path)])
        == 0
    )
    config, command = json.loads(target.read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(6 / 8**0.5) and not config["use_rslora"]
    assert command[command.index("--base") + 1] == EMBEDDED


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"alpha_pattern": {"o_proj": 4}}, "model.alpha_pattern"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "model.rope_scaling"),
        ({"rank_pattern": {"o_proj": 4}, "lora_variant": "rslora"}, "rslora with model.rank_pattern"),
    ],
)
def test_gguf_refuses_scales_that_llama_cpp_has_not(refused, tmp_path, model, said):
    base = tiny_models.save("llama", tmp_path / "base")
    adapter = adapters.trained(tmp_path / "run", base, steps=1, **model)
    (tmp_path / "convert_lora_to_gguf.py").write_text("")
    where = ["--output", tmp_path / "x.gguf", "--llama-cpp", tmp_path]
    assert said in refused(export, "--adapter", adapter, "--to", "gguf", *where)


def test_gguf_refuses_dora(tmp_path):
    (tmp_path / "convert_lora_to_gguf.py").write_text("")
    adapter = adapters.trained(tmp_path / "run", EMBEDDED, steps=1, lora_variant="dora")
    with pytest.raises(ConfigError, match="has no magnitudes"):
        export._to_gguf(export._parser().parse_args(
            ["--adapter", str(adapter), "--to", "gguf", "--output", "x", "--llama-cpp", str(tmp_path)]))  # fmt: skip
