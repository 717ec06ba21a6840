"""Nothing of a record is left out without a word: what is counted, told, and stops a run."""

import datetime
import json

import pytest

from qlora_ray.config import Config, base_model_path
from qlora_ray.data.examples import read_examples
from qlora_ray.data.prepare import prepare
from qlora_ray.data.rows import chat_template_of
from qlora_ray.data.stats import Layout
from qlora_ray.data.tokenize import Encoder, load_tokenizer, prompt_ids
from qlora_ray.errors import ConfigError
from qlora_ray.storage import open_folder
from tests.unit.test_formats import TURNS
from tests.unit.test_template_matrix import FILES, TOOLS, U2, U, call, says, tokenizer_of

EMBEDDED = base_model_path("embedded")
THINKS = [U, says("Tell omega.", reasoning_content="Think chi.")]
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
DROPS = (  # thoughts of all but the last answer
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def prepared(tmp_path):
    """Prepares records with a template of one's own."""

    def prepare_records(records, template=None, **data):
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        if template is not None:
            (tmp_path / "own.jinja").write_text(template)
            data["chat_template"] = str(tmp_path / "own.jinja")
        asked = {"train_file": str(path), "validation_split": 0, **data}
        return prepare(
            Config.model_validate({"data": asked}), open_folder(str(tmp_path / "storage")), how=Layout(packing=False)
        )

    return prepare_records


def trained_texts(template, turns, **how) -> list[list[str]]:
    tokenizer = load_tokenizer(EMBEDDED, None, chat_template=template)
    (made,) = Encoder(tokenizer, 512, **how).encode([turns])
    return [[tokenizer.decode(sample.input_ids[a:b]) for a, b in sample.spans] for sample in made]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"messages": THINKS}, "a thought that is to be trained on"),
        ({"messages": [U, says("Tell omega.")], "tools": TOOLS}, "the tools"),
        ({"messages": [U, says("Tell omega.", tool_calls=[call()])]}, "a tool call"),
        ({"messages": [{**U, "name": "Ada"}, says("Tell omega.")]}, "a name"),
    ],
)
def test_what_the_template_leaves_out_of_many_records_stops_the_run_and_of_few_is_counted(prepared, record, kind):
    plain = {"messages": [U, says("Tell omega.")]}
    with pytest.raises(ConfigError) as refused:
        prepared([plain] * 10 + [record] * 2)
    said = str(refused.value)
    assert f"the chat template leaves out {kind}, in 2 of 12 records (first: line 11); data.max_bad_fraction" in said
    made = prepared([plain] * 10 + [record] * 2, max_bad_fraction=0.2)
    assert made.stats.missing == {kind: 2}
    assert f"The chat template leaves out {kind}, in 2 of 12 records." in made.stats.notes


def test_earlier_thoughts_that_the_template_means_to_drop_are_told_and_do_not_stop(prepared):
    two = {"messages": [*THINKS, U2, says("Tell psi.", reasoning_content="Think rho.")]}
    made = prepared([two] * 3, DROPS)
    assert made.stats.missing == {"thoughts of earlier answers": 3} and made.stats.num_samples == 3
    kept = prepared([two] * 3, DROPS, keep_thoughts="all")
    assert kept.stats.missing == {} and kept.stats.num_samples == 6


def test_each_thought_that_the_template_drops_later_is_a_sample_of_its_own():
    turns = [*THINKS, U2, says("Tell psi.", reasoning_content="Think rho."), U, says("Tell phi.")]
    assert trained_texts(DROPS, turns) == [["Tell omega.<|end|>", "Tell psi.<|end|>", "Tell phi.<|end|>"]]
    assert trained_texts(DROPS, turns, keep_thoughts="all") == [
        ["<think>Think rho.</think>Tell psi.<|end|>"],
        ["<think>Think chi.</think>Tell omega.<|end|>"],
        ["Tell phi.<|end|>"],
    ]


def test_fields_that_look_like_content_and_are_not_read_are_named_with_their_count(prepared):
    turns = [TURNS[1], {**TURNS[4], "refusal": "I will not say so"}]
    records = [{"messages": turns, "id": 7, "context": "Some text to read."}] * 2 + [{"messages": TURNS}]
    made = prepared(records)
    assert made.stats.unused == {"context": 2, "messages[].refusal": 2}
    assert "Fields that no format reads, with records: context (2), messages[].refusal (2)." in made.stats.notes


def test_measuring_examples_refuses_what_training_refuses(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": THINKS}) + "\n")
    with pytest.raises(ConfigError, match="--file=.*leaves out a thought"):
        read_examples(str(path), "--file", Encoder(load_tokenizer(EMBEDDED, None), 512))


def test_the_day_that_a_template_prints_is_fixed_once_and_part_of_what_is_cached(prepared, tmp_path, monkeypatch):
    record = {"messages": [U, says("Tell omega.")]}
    first = prepared([record], DATED)
    today = datetime.date.today()
    assert first.stats.date == today.isoformat()
    fixed = chat_template_of(first.entry)
    assert repr(today.strftime("%d %b %Y")) in fixed and "strftime_now" not in fixed
    (tmp_path / "storage" / "cache" / "date.txt").write_text("2020-02-03")  # as if it had begun then
    assert "'03 Feb 2020'" in chat_template_of(prepared([record], DATED).entry)
    asked = prepared([record], DATED, date="2021-05-06")
    assert "'06 May 2021'" in chat_template_of(asked.entry)
    assert asked.train[0].entry.name != first.train[0].entry.name
    with pytest.raises(ConfigError, match="data.date=2021-05-06: the chat template prints no date"):
        prepared([record], date="2021-05-06")
    with pytest.raises(ValueError, match="must be a day"):
        prepared([record], DATED, date="2021-13-06")


@pytest.mark.parametrize("name", ["llama31", "gpt_oss", "granite", "smollm3"])
def test_every_way_in_which_a_template_asks_for_the_day_is_fixed(name):
    assert "strftime_now" in FILES[name] and "strftime_now" not in tokenizer_of(name).chat_template


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_our_templates_begin_with_bos_once_where_the_tokenizer_begins_texts_so(name, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    base = AutoTokenizer.from_pretrained(EMBEDDED)
    base.chat_template = None
    single = [(base.bos_token, base.bos_token_id)]
    base.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=single)
    base.save_pretrained(tmp_path)
    from qlora_ray.data.template import NAMED

    tokenizer = load_tokenizer(str(tmp_path), None, chat_template=None if name == "plain" else NAMED[name])
    encoder = Encoder(tokenizer, 512)
    (((sample,),),) = (encoder.encode([TURNS]),)
    prompt = prompt_ids(tokenizer, TURNS[:-1])
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1 and sample.input_ids[0] == tokenizer.bos_token_id
    assert sample.input_ids[: len(prompt)] == prompt and encoder.notes() == ()
    own = load_tokenizer(str(tmp_path), None, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "The tokenizer begins texts with <|bos|>, its chat template does not" in Encoder(own, 512).notes()[0]


def test_notes_tell_of_an_opening_that_no_row_has_and_of_a_closing_that_is_no_token():
    assert Encoder(tokenizer_of("qwen3"), 512).notes() == ()
    (opening,) = Encoder(tokenizer_of("deepseek_r1"), 512).notes()
    assert "opens an answer with '<think>\\n', and no row has it" in opening
    (closing,) = Encoder(tokenizer_of("text_closer"), 512).notes()
    assert "closes an answer with '[/end]', which is no token of its own" in closing


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("all_assistant_turns", ["Tell omega.", "<tool_call>", "Tell psi."]),
        ("last_turn", ["Tell psi."]),
        ("last_exchange", ["<tool_call>", "Tell psi."]),
        ("tool_calls", ["<tool_call>"]),
        ("last_tool_call", ["<tool_call>"]),
    ],
)
def test_train_on_names_the_turns_that_are_trained_on(train_on, trained):
    result = {"role": "tool", "content": "result sigma"}
    turns = [U, says("Tell omega."), U2, says("", tool_calls=[call()]), result, says("Tell psi.")]
    tokenizer = tokenizer_of("chatml")
    (((sample,),),) = (Encoder(tokenizer, 512, train_on).encode([turns]),)
    texts = [tokenizer.decode(sample.input_ids[a:b]) for a, b in sample.spans]
    assert len(texts) == len(trained) and all(
        text.startswith(first) for text, first in zip(texts, trained, strict=True)
    )
