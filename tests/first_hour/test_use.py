"""Using what was trained on the first day: ask it, judge it, ship it."""

import json

from tests.integration import door


def test_generate_answers_a_held_out_prompt_as_the_run_did(quickstart):
    run, _ = quickstart
    samples = json.loads((run / "samples.json").read_text())
    sample = next(one for one in samples if one["adapter"].strip() == one["expected"].strip())
    ended = door.run("--adapter", str(run), "--prompt", sample["prompt"], "max_new_tokens=48", of="generate")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == sample["expected"].strip()


def test_evaluate_says_how_much_better_than_its_base_it_is(quickstart, tmp_path):
    run, _ = quickstart
    results = tmp_path / "results.json"
    ended = door.run("--adapter", str(run), "--num-prompts", "8", "--output", str(results), of="evaluate")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(results.read_text())
    assert found["with_adapter"]["loss"] < 0.1 * found["base"]["loss"]
    assert (found["base"]["exact_match"], found["with_adapter"]["exact_match"]) == (0, 1)


def test_export_merges_into_a_model_that_plain_transformers_loads(quickstart, tmp_path):
    run, _ = quickstart
    merged = tmp_path / "merged"
    arguments = ("--adapter", str(run), "--to", "merged", "--output", str(merged), "--verify", "--num-rows", "8")
    ended = door.run(*arguments, of="export")
    assert ended.returncode == 0, ended.stderr
    assert json.loads((merged / "verification.json").read_text())["num_rows"] == 8
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(merged) for kind in (AutoModelForCausalLM, AutoTokenizer))
    sample = json.loads((run / "samples.json").read_text())[0]
    turns = [{"role": "user", "content": sample["prompt"]}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True).strip() == sample["adapter"].strip()
