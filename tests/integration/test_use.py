"""What generate and evaluate promise, in this process, on adapters made here."""

import importlib.util
import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from qlora_ray import evaluate, generate
from qlora_ray.config import ModelConfig, base_model_path
from qlora_ray.data.formats import to_messages
from qlora_ray.data.template import CHATML_TEMPLATE, PLAIN_TEMPLATE
from qlora_ray.data.tokenize import load_tokenizer, prompt_ids
from qlora_ray.errors import ConfigError
from qlora_ray.inference.batch import to_prompt
from qlora_ray.inference.load import load
from qlora_ray.inference.options import read_opening
from qlora_ray.model.answer import answer_texts, exact_match, left_padded, stop_token_ids, token_f1
from qlora_ray.model.base import load_base
from qlora_ray.model.record import FILE, describe_base, find_adapter, open_adapter, tokenizer_sha256
from tests.integration import tiny_models

CPU = torch.device("cpu")
EMBEDDED = base_model_path("embedded")
RECORDS = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("yes", "no", "red", "a b c")]


def plain_answer(adapter, prompt: str, max_new_tokens: int, base_only=False) -> str:
    """What transformers and PEFT alone say."""
    opened = open_adapter(str(adapter))
    model = load_base(opened.model, opened.quantization, "float32", CPU)
    if not base_only:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    turns = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_prompt_gets_the_answer_of_plain_transformers_and_peft(trained, capsys):
    arguments = ["--adapter", str(trained), "--prompt", "Copy: green tree", "max_new_tokens=12", "--compare"]
    assert generate.main(arguments) == 0
    base, _, adapted = capsys.readouterr().out.partition("adapter:\n")
    assert base.removeprefix("base:\n").strip() == plain_answer(trained, "Copy: green tree", 12, base_only=True).strip()
    assert adapted.strip() == plain_answer(trained, "Copy: green tree", 12).strip()
    assert base.removeprefix("base:\n") != adapted


def test_run_directory_means_its_best_adapter(trained, tmp_path):
    run = trained.parent
    assert find_adapter(str(run)) == run / "adapter"
    other = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "adapter", other / "adapter_best")
    assert find_adapter(str(other)) == other / "adapter_best"


def test_embedded_base_is_found_wherever_the_package_is(copied):
    config = json.loads((copied / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone/qlora_ray/assets/tiny_base"
    (copied / "adapter_config.json").write_text(json.dumps(config))
    record = json.loads((copied / FILE).read_text())
    record["base"]["base_model"] = "embedded"
    (copied / FILE).write_text(json.dumps(record))
    assert load(open_adapter(str(copied)), CPU).context_length == 1024


def test_hub_base_is_recorded_and_opened_at_its_commit(copied, tmp_path, monkeypatch):
    import huggingface_hub.constants

    cache, commit = tmp_path / "hub", "a" * 40
    snapshot = cache / "models--owner--name" / "snapshots" / commit
    shutil.copytree(EMBEDDED, snapshot)
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    described = describe_base(ModelConfig(base_model="owner/name"))
    assert (described["base_model"], described["commit"]) == ("owner/name", commit)
    record = json.loads((copied / FILE).read_text())
    (copied / FILE).write_text(json.dumps({**record, "base": described}))
    (refs / "main").write_text("b" * 40)  # the branch has moved on
    assert open_adapter(str(copied)).base == str(snapshot)
    shutil.rmtree(snapshot)
    with pytest.raises(ConfigError, match="the model hub did not give it"):
        open_adapter(str(copied))


def test_chat_remembers_until_reset(trained, capsys, monkeypatch):
    said = iter(["one", "two", "/reset", "one", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert generate.main(["--adapter", str(trained), "--chat", "max_new_tokens=6"]) == 0
    out = capsys.readouterr().out
    first, again = out.partition("(forgotten)\n")[::2]
    assert again and first.startswith(again)


def test_sampling_repeats_with_the_same_seed(trained, capsys):
    def answer(seed):
        arguments = ["--prompt", "Hello", "--seed", str(seed), "temperature=1.5", "max_new_tokens=16"]
        assert generate.main(["--adapter", str(trained), *arguments]) == 0
        return capsys.readouterr().out

    assert answer(1) == answer(1) != answer(2)


def test_answers_end_where_the_chat_template_closes_a_turn():
    tokenizer = load_tokenizer(EMBEDDED, None)
    model = load_base(
        tiny_models.make_config(EMBEDDED).model, tiny_models.make_config(EMBEDDED).quantization, "float32", CPU
    )
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + eos_token", "message['content'] + '<|system|>'"
    )
    closing = tokenizer.convert_tokens_to_ids("<|system|>")
    assert stop_token_ids(model, tokenizer) == sorted({closing, tokenizer.eos_token_id})
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert stop_token_ids(model, tokenizer) == [tokenizer.eos_token_id]


def test_answers_end_at_the_text_that_closes_a_turn_where_no_token_does():
    config = tiny_models.make_config(EMBEDDED)
    model, tokenizer = load_base(config.model, config.quantization, "float32", CPU), load_tokenizer(EMBEDDED, None)
    closed_by = "{% for m in messages %}<|user|>{{ m.content }}CLOSING{% endfor %}"
    prompts = [tokenizer("<|user|>Copy: green trees<|end|><|assistant|>")["input_ids"]] * 2
    tokenizer.chat_template = closed_by.replace("CLOSING", "{{ eos_token }}")
    whole = answer_texts(model, prompts, tokenizer, CPU, max_new_tokens=12)[0]
    closing = whole.strip()[3:6].strip()
    assert closing
    tokenizer.chat_template = closed_by.replace("CLOSING", closing)
    ended = answer_texts(model, prompts, tokenizer, CPU, max_new_tokens=12)
    assert ended == [whole.partition(closing)[0]] * 2 and len(ended[0]) < len(whole)


TOOLS = [{"name": "find_town", "description": "Finds a town.", "parameters": {"type": "object", "properties": {}}}]


def test_tools_of_a_file_and_of_a_row_reach_the_prompt_as_in_training(copied, tmp_path, capsys):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    arguments = ["--adapter", str(copied), "--prompt", "Where?", "--tools", str(file), "max_new_tokens=2"]
    assert generate.main(arguments) == 2
    assert "the prompt cannot be put to this model: the chat template leaves out the tools" in capsys.readouterr().err
    tokenizer = load_tokenizer(EMBEDDED, None, chat_template=CHATML_TEMPLATE)
    tokenizer.save_pretrained(copied)
    record = json.loads((copied / FILE).read_text())
    (copied / FILE).write_text(json.dumps({**record, "tokenizer_sha256": tokenizer_sha256(tokenizer)}))
    assert generate.main(arguments) == 0
    question = {"role": "user", "content": "Where?"}
    of_file = [*read_opening(str(file), None), question]
    wanted = prompt_ids(tokenizer, to_messages({"messages": [question, {"role": "assistant", "content": "x"}],
                                                "tools": TOOLS}, "auto")[:-1])  # fmt: skip
    assert prompt_ids(tokenizer, of_file) == wanted and "find_town" in tokenizer.decode(wanted)
    assert to_prompt(json.dumps({"messages": [question], "tools": TOOLS}), [])[1] == of_file
    assert to_prompt(json.dumps({"prompt": "Where?"}), of_file[:1])[1] == of_file
    own = to_prompt(json.dumps({"prompt": "Where?", "tools": [{"name": "own"}]}), of_file[:1])[1]
    assert [tool["function"]["name"] for tool in own[0]["tools"]] == ["own"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '["x"]'])
def test_a_file_of_tools_that_is_none_is_refused_by_name(tmp_path, content):
    file = tmp_path / "tools.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"--tools {file}: "):
        read_opening(str(file), None)
    with pytest.raises(ConfigError, match="--tools gone.json: No such file"):
        read_opening("gone.json", None)


def test_evaluate_measures_the_loss_that_a_plain_loop_measures(trained, tmp_path, capsys):
    file, output = tmp_path / "records.json", tmp_path / "results.json"
    file.write_text(json.dumps(RECORDS))
    arguments = ["--adapter", str(trained), "--file", str(file), "--output", str(output), "max_new_tokens=8"]
    assert evaluate.main(arguments) == 0
    results = json.loads(output.read_text())
    opened = open_adapter(str(trained))
    model = PeftModel.from_pretrained(load_base(opened.model, opened.quantization, "float32", CPU), str(trained)).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for who in ("with_adapter", "base"):
        nats, tokens = 0.0, 0
        for record in RECORDS:
            question = {"role": "user", "content": record["instruction"]}
            prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt + record["output"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            first = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            nats -= float(sum(log_p[i - 1, ids[i]] for i in range(first, len(ids))))
            tokens += len(ids) - first
        # The same float32 forward in batches: 1e-6. A token too many or too few is worth a hundredth.
        assert results[who]["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        model.disable_adapter_layers()
    assert results["num_label_tokens"] == tokens
    said = [row["with_adapter"].strip() for row in results["answers"]]
    assert said[0] == plain_answer(trained, RECORDS[0]["instruction"], 8).strip()
    assert "exact_match" in capsys.readouterr().out


def test_exact_match_ignores_outer_space_and_f1_counts_words():
    assert exact_match([" a\n", "b"], ["a", "c"]) == 0.5
    assert token_f1(["a b c", "x"], ["a b", "y"]) == pytest.approx((2 * 2 / 5 + 0) / 2)
    assert token_f1(["", "a a"], ["", "a"]) == pytest.approx((1 + 2 / 3) / 2)


def test_left_padding_leaves_the_prompt_at_the_end():
    padded = left_padded([[5, 6], [7]], 0, CPU)
    assert padded["input_ids"].tolist() == [[5, 6], [0, 7]] and padded["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_card_names_base_data_metrics_and_a_config_that_loads(trained, tmp_path):
    import yaml

    from qlora_ray.config import load_config

    card = (trained / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    record = json.loads((trained / FILE).read_text())
    for fact in (record["base"]["sample_sha256"], record["data"]["fingerprint"], "nf4, double quantization", "0.1000"):
        assert fact in card
    text = card.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml").model.lora_r == 8


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_tasks_run_for_base_and_adapter(trained, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "Copy: red", "expected": "red"}\n')
    (tmp_path / "copying.yaml").write_text(
        f"task: copying\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{expected}}'\n"
        "generation_kwargs: {until: [], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    records = tmp_path / "records.json"
    records.write_text(json.dumps(RECORDS))
    results = tmp_path / "results.json"
    arguments = ["--adapter", str(trained), "--file", str(records), "--num-prompts", "0", "--output", str(results)]
    assert evaluate.main([*arguments, "--tasks", "copying", "--include-path", str(tmp_path)]) == 0
    expected = {
        who: float(plain_answer(trained, "Copy: red", 8, who == "base") == "red") for who in ("base", "with_adapter")
    }
    assert json.loads(results.read_text())["tasks"]["copying"]["exact_match"] == expected
    assert evaluate.main([*arguments, "--tasks", "no_such_task"]) == 2
