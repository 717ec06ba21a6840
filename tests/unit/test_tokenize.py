"""What is trained on: masks from the template itself, against transformers' own and against renderings of prefixes."""

import json
import pickle
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from qlora_ray.config import Config, base_model_path
from qlora_ray.data import mask
from qlora_ray.data.prepare import make_recipe
from qlora_ray.data.template import CHATML_TEMPLATE, PLAIN_TEMPLATE, find_template
from qlora_ray.data.tokenize import IGNORE_INDEX, Encoder, load_tokenizer, prompt_ids
from qlora_ray.data.work import encoder_of
from qlora_ray.errors import BadRecord, ConfigError
from tests.unit.test_formats import TURNS

EMBEDDED = base_model_path("embedded")
# Templates as models have them: with an own start, trimmed contents, system texts in the first question, thoughts.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n\n' + (m.content | trim) + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '')"
    " + m.content | trim + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content"
    " else '' %}{{ '<think>\n' + thought + '\n</think>\n\n' + answer }}{% else %}{{ answer }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_CLOSING = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
TEMPLATES = {"plain": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE, "llama3": LLAMA3, "llama2": LLAMA2, "qwen3": QWEN3}


def tokenizer_with(template: str | None = None):
    return load_tokenizer(EMBEDDED, None, chat_template=template)


def encode(tokenizer, turns, max_length=512, train_on="all_assistant_turns"):
    (made,) = Encoder(tokenizer, max_length, train_on).encode([turns])
    if isinstance(made, BadRecord):
        raise made
    (sample,) = made
    return sample


def trained_text(tokenizer, sample) -> list[str]:
    """The text of each trained span."""
    return [tokenizer.decode(sample.input_ids[start:end]) for start, end in sample.spans]


def random_conversations(count: int) -> list[list[dict]]:
    """Conversations that are out to deceive: contents repeat, hold role names, border spaces and other scripts."""
    pick = random.Random(5)
    words = ["assistant", "user", "3", "3", " ", "\n", "京都", "é", "naïve", "the", "<b>", "### Assistant:", "🙂", ":"]
    text = lambda: pick.choice(["", " ", "\n"]) + "x" + "".join(pick.choices(words, k=pick.randint(1, 9)))  # noqa: E731
    made = []
    for _ in range(count):
        turns = [{"role": role, "content": text()} for role in ["user", "assistant"] * pick.randint(1, 3)]
        made.append([{"role": "system", "content": text()}] * pick.randint(0, 1) + turns)
    return made


def test_labels_of_the_embedded_base_are_those_of_transformers_own_mask():
    tokenizer = tokenizer_with()
    for turns in [TURNS, *random_conversations(60)]:
        theirs = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        sample = encode(tokenizer, turns)
        assert sample.input_ids == theirs["input_ids"]
        masked = [
            token if mask else IGNORE_INDEX
            for token, mask in zip(sample.input_ids, theirs["assistant_masks"], strict=True)
        ]
        assert sample.labels == masked
    assert trained_text(tokenizer, encode(tokenizer, TURNS)) == ["Kyoto, 京都.<|end|>", "Lima<|end|>"]


def by_prefixes(tokenizer, turns) -> tuple[list[int], list[int]]:
    """Token ids and labels by a slower way: an answer lies between the renderings of what is before it and with it.

    The whole is cut where an answer begins.
    """

    def rendered(some, **more):
        return tokenizer.apply_chat_template(some, tokenize=False, **more)

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = rendered(turns)
    spans, cuts = [], [0]
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before, through = rendered(turns[:i], add_generation_prompt=True), rendered(turns[: i + 1]).rstrip("\n")
            assert whole.startswith(through) and through.startswith(before)
            spans.append((len(before), len(through)))
            cuts.append(len(before))
    made, labels = [], []
    for first, last in zip(cuts, [*cuts[1:], len(whole)], strict=True):
        lead = "\n" if first else ""  # what a tokenizer puts before a text's begin is not to stand within
        encoded = tokenizer(lead + whole[first:last], add_special_tokens=False, return_offsets_mapping=True)
        skip = len(ids_of(lead)) if lead and encoded["input_ids"][: len(ids_of(lead))] == ids_of(lead) else 0
        if lead and not skip:
            lead = ""
            encoded = tokenizer(whole[first:last], add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))[skip:]:
            start, end = start + first - len(lead), end + first - len(lead)
            made.append(token)
            labels.append(token if any(start < b and a < end for a, b in spans) else IGNORE_INDEX)
    return made, [IGNORE_INDEX, *labels[1:]]


@pytest.mark.parametrize("name", ["plain", "chatml", "llama3", "llama2"])
def test_labels_are_what_lies_between_the_renderings_of_prefixes(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    for turns in [TURNS, *random_conversations(60)]:
        sample = encode(tokenizer, turns, max_length=2000)
        assert (sample.input_ids, sample.labels) == by_prefixes(tokenizer, turns)
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt = prompt_ids(tokenizer, turns[:i])
                assert sample.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("plain", ["Kyoto, 京都.<|end|>", "Lima<|end|>"]),
        ("chatml", ["Kyoto, 京都.<|end|>", "Lima<|end|>"]),
        ("llama3", ["Kyoto, 京都.<|end|>", "Lima<|end|>"]),
        ("llama2", [" Kyoto, 京都. <|end|>", " Lima <|end|>"]),
        ("qwen3", ["Kyoto, 京都.<|end|>", "<think>\n\n</think>\n\nLima<|end|>"]),
    ],
)
def test_answers_and_their_closing_token_are_trained_on_and_nothing_else(name, trained):
    tokenizer = tokenizer_with(TEMPLATES[name])
    assert trained_text(tokenizer, encode(tokenizer, TURNS)) == trained


def test_thoughts_that_the_template_drops_or_keeps_do_not_mislead_the_mask():
    tokenizer = tokenizer_with(QWEN3)
    thinking = [{**turn} for turn in TURNS]
    thinking[2]["content"] = "<think>\nEast or west?\n</think>\n\nKyoto."
    thinking[4]["content"] = "<think>\nSouth!\n</think>\n\nLima"
    sample = encode(tokenizer, thinking)
    assert trained_text(tokenizer, sample) == ["Kyoto.<|end|>", "<think>\nSouth!\n</think>\n\nLima<|end|>"]


def test_spans_of_generation_tags_are_taken_and_the_closing_token_added():
    tagged = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{{ 'Says: ' }}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    tokenizer = tokenizer_with(tagged)
    assert trained_text(tokenizer, encode(tokenizer, TURNS)) == ["Kyoto, 京都.<|end|>", "Lima<|end|>"]


def test_a_template_without_a_closing_token_gets_one():
    tokenizer = tokenizer_with(NO_CLOSING)
    sample = encode(tokenizer, TURNS[1:3])
    assert sample.input_ids[-1] == tokenizer.eos_token_id and sample.labels[-1] == tokenizer.eos_token_id
    # This template has no generation prompt, so the model has to say its role, too.
    assert trained_text(tokenizer, sample)[0] == "assistant: Kyoto, 京都."


def test_last_turn_and_everything_can_be_trained_on_instead():
    tokenizer = tokenizer_with(PLAIN_TEMPLATE)
    assert trained_text(tokenizer, encode(tokenizer, TURNS, train_on="last_turn")) == ["Lima<|end|>"]
    everything = encode(tokenizer, TURNS, train_on="everything")
    assert everything.spans == [(1, len(everything.input_ids))]


def test_an_answer_of_weight_0_is_read_but_not_trained_on():
    tokenizer = tokenizer_with()
    turns = [*TURNS[:2], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    assert trained_text(tokenizer, encode(tokenizer, turns)) == ["Lima<|end|>"]
    assert encode(tokenizer, turns).input_ids == encode(tokenizer, TURNS).input_ids


def test_raw_prompt_is_not_trained_on_and_the_completion_is_closed():
    tokenizer = tokenizer_with()
    sample = encode(tokenizer, [{"role": "prompt", "content": "2 + 2 ="}, {"role": "completion", "content": " 4"}])
    assert tokenizer.decode(sample.input_ids) == "2 + 2 = 4<|end|>"
    assert "".join(trained_text(tokenizer, sample)) == " 4<|end|>"
    assert sample.input_ids[: len(sample.input_ids) - sample.num_labels] == prompt_ids(
        tokenizer, [{"role": "prompt", "content": "2 + 2 ="}]
    )


def test_long_text_becomes_windows_that_lose_nothing():
    tokenizer = tokenizer_with()
    text = "One two three four five. " * 40
    for max_length in (16, 17, 50, 10_000):
        (windows,) = Encoder(tokenizer, max_length).encode([[{"role": "text", "content": text}]])
        together = [token for window in windows for token in window.input_ids]
        assert together == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert all(2 <= len(window.input_ids) <= max_length for window in windows)
        assert all(window.spans == [(1, len(window.input_ids))] for window in windows)


def test_raw_text_begins_as_the_tokenizer_begins_texts():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with()
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    sample = encode(tokenizer, [{"role": "prompt", "content": "a"}, {"role": "completion", "content": " b"}])
    assert tokenizer.decode(sample.input_ids) == f"{bos}a b<|end|>"
    assert "".join(trained_text(tokenizer, sample)) == " b<|end|>"


def test_truncation_never_leaves_a_sample_without_a_label():
    tokenizer = tokenizer_with()
    whole = encode(tokenizer, TURNS)
    refused = 0
    for max_length in range(1, len(whole.input_ids) + 2):
        try:
            sample = encode(tokenizer, TURNS, max_length)
        except BadRecord as reason:
            refused += 1
            assert f"training.max_length={max_length}" in str(reason)
            assert set(whole.labels[1:max_length]) <= {IGNORE_INDEX}
            continue
        assert any(label != IGNORE_INDEX for label in sample.labels[1:])
        assert (sample.input_ids, sample.labels) == (whole.input_ids[:max_length], whole.labels[:max_length])
        assert sample.truncated == (max_length < len(whole.input_ids))
    assert 0 < refused < len(whole.input_ids)


def test_answers_of_a_conversation_of_thousands_of_turns_are_trained_on():
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(1100) for role in ("user", "assistant")]
    tokenizer = tokenizer_with(CHATML_TEMPLATE)
    said = trained_text(tokenizer, encode(tokenizer, turns, max_length=200_000))
    assert [text.partition("<")[0] for text in said] == [f"assistant {n}" for n in range(1100)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_far_turns_are_marked_as_if_each_prefix_had_been_rendered(name, monkeypatch):
    pick = random.Random(1)
    turns = [{"role": "system", "content": "Be brief."}]
    for n in range(90):
        thought = f"<think>\nso {n}\n</think>\n\n" if pick.random() < 0.3 else ""
        turns += [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"{thought}told {n}"}]
    made = encode(tokenizer_with(TEMPLATES[name]), turns, max_length=200_000)
    monkeypatch.setattr(mask, "FIRST_TURNS", len(turns))
    assert made == encode(tokenizer_with(TEMPLATES[name]), turns, max_length=200_000)
    assert len(made.spans) == 90


def test_first_token_is_never_trained_on_since_nothing_predicts_it():
    answers = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    sample = encode(tokenizer_with(answers), TURNS[1:3])
    assert sample.labels[0] == IGNORE_INDEX and sample.labels[1:] == sample.input_ids[1:]
    with pytest.raises(BadRecord):
        encode(tokenizer_with(answers), TURNS[1:3], max_length=1)


def test_one_refused_conversation_does_not_spoil_its_batch():
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    refusing = no_system + PLAIN_TEMPLATE
    bad, good = Encoder(tokenizer_with(refusing), 512).encode([TURNS, TURNS[1:]])
    assert isinstance(bad, BadRecord) and bad.detail == "no system here"
    assert good == Encoder(tokenizer_with(PLAIN_TEMPLATE), 512).encode([TURNS[1:]])[0]


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "words"])
def test_spans_found_by_bisection_are_the_tokens_that_overlap(kind):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    conversations = random_conversations(40)
    texts = [turn["content"] for turns in conversations for turn in turns]
    if kind == "words":
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # drops spaces: characters that no token covers
        tokenizer.normalizer = normalizers.NFD()  # changes the number of characters
    elif kind == "metaspace":
        tokenizer, trainer = Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]")), trainers.BpeTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["[UNK]", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(texts, trainer(vocab_size=320, special_tokens=special, show_progress=False))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|bos|>", pad_token="<|end|>", unk_token="[UNK]"
    )
    fast.chat_template = LLAMA3
    for turns in conversations:
        sample = encode(fast, turns, max_length=3000)
        assert (sample.input_ids, sample.labels) == by_prefixes(fast, turns)


def test_tokenizer_without_template_gets_the_plain_one(tmp_path):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(EMBEDDED)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), None).chat_template == PLAIN_TEMPLATE
    assert load_tokenizer(str(tmp_path), None, chat_template=LLAMA3).chat_template == LLAMA3


def test_template_is_found_by_name_or_file(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(LLAMA3)
    assert (find_template(None), find_template("chatml"), find_template(str(path))) == (None, CHATML_TEMPLATE, LLAMA3)
    with pytest.raises(ConfigError, match="data.chat_template=no.jinja: no such file"):
        find_template("no.jinja")


def tokenizer_folder(folder, **changes) -> str:
    """The embedded base's tokenizer with other parts in its tokenizer.json."""
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    known = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(known | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "loses the spaces between words"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "o"}, "content": ""}}, "is another text"),
    ],
)
def test_tokenizer_that_does_not_give_a_text_back_is_refused_with_the_reason(changes, reason, tmp_path):
    config = Config.model_validate({"model": {"base_model": tokenizer_folder(tmp_path, **changes)}})
    with pytest.raises(ConfigError, match="its tokenizer does not give a text back") as refused:
        encoder_of(make_recipe(config))
    assert reason in str(refused.value) and "tokenizer_class" in str(refused.value)


def test_tokenizer_that_gives_a_text_back_in_lower_case_is_taken_with_a_note(tmp_path):
    folder = tokenizer_folder(tmp_path, normalizer={"type": "Lowercase"})
    encoder = encoder_of(make_recipe(Config.model_validate({"model": {"base_model": folder}})))
    (note,) = [note for note in encoder.notes() if "back as" in note]
    assert "'every quick fox" in note
    assert not [note for note in encoder_of(make_recipe(Config())).notes() if "back as" in note]


def test_a_tokenizer_that_another_process_gets_makes_the_same_tokens():
    own = load_tokenizer(EMBEDDED, None)
    got = pickle.loads(pickle.dumps(own))
    texts = [turn["content"] + "<|end|>" for turns in random_conversations(40) for turn in turns]
    assert [got(text)["input_ids"] for text in texts] == [own(text)["input_ids"] for text in texts]
    assert (got.chat_template, got.special_tokens_map) == (own.chat_template, own.special_tokens_map)
    assert str(got.added_tokens_decoder) == str(own.added_tokens_decoder)


def test_a_process_that_gets_a_tokenizer_loads_no_torch(tmp_path):
    (tmp_path / "tokenizer").write_bytes(pickle.dumps(load_tokenizer(EMBEDDED, None)))
    script = (
        "import pickle, sys; import qlora_ray.data.spread; from qlora_ray.data.tokenize import Encoder; "
        "encoder = Encoder(pickle.load(open(sys.argv[1], 'rb')), 512); "
        "turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]; "
        "print(len(encoder.encode([turns])), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "tokenizer")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["1", "False"]
