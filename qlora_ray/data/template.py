"""Chat templates as text: ours by name, a user's file, the tokenizer's own, each fitted to the tokenizer and a date."""

import re
from datetime import date as Date

from qlora_ray.config import find_file
from qlora_ray.errors import ConfigError

# For models without a chat template. The answer is closed by the tokenizer's own end-of-sequence token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}### {{ message.role | capitalize }}:\n{{ message.content }}"
    "{{ eos_token + '\n' if message.role == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
# ChatML, with tools and thoughts in the tags that most models of its kind know. Jinja drops a line's end after a tag.
CHATML_TEMPLATE = (
    "{% set end = '<|im_end|>' %}{% set turns = messages %}"
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}These functions may be called:\n<tools>\n"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}</tools>\nA call is written as\n<tool_call>\n"
    '{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in turns %}<|im_start|>{{ message.role }}"
    "{{ ' name=' + message.name if message.name and message.role in ('system', 'user') }}{{ '\n' }}"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>{{ '\n\n' }}{% endif %}"
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "{{ '\n' if message.content or not loop.first }}<tool_call>\n"
    '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{{ (end if message.role == 'assistant' else '<|im_end|>') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = {"plain": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE}
ASKS_DATE = "strftime_now"
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def find_template(name: str | None) -> str | None:
    """The template text behind `data.chat_template`: a name or a file; None is the tokenizer's own. ConfigError."""
    if name is None or name in NAMED:
        return name and NAMED[name]
    path = find_file(name)
    if not path.is_file():
        raise ConfigError(
            f"data.chat_template={name}: no such file, and not a name. Names: {', '.join(NAMED)}; "
            "leave it out for the tokenizer's own."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.chat_template={name}: not UTF-8 (byte {error.start}).") from None


def fit_template(template: str | None, tokenizer, begins_with_bos: bool, date: str | None) -> str:
    """The template that a tokenizer is to have: `template`, else its own, else the plain one. Raises ConfigError."""
    own = tokenizer.chat_template
    if template is None and isinstance(own, dict):  # templates by name, one of them for tools
        default = own.get("default", PLAIN_TEMPLATE)
        both = "{% if tools %}" + own.get("tool_use", "") + "{% else %}" + default + "{% endif %}"
        template = both if "tool_use" in own else default
    template = template or own or PLAIN_TEMPLATE
    is_ours = template in NAMED.values()
    if template == CHATML_TEMPLATE and "<|im_end|>" not in tokenizer.get_vocab():
        # As ordinary text it would end no answer: the model's own token does.
        template = template.replace("set end = '<|im_end|>'", "set end = eos_token")
    if is_ours and begins_with_bos:
        template = "{{ bos_token }}" + template
    return template if date is None else fix_date(template, date)


def fix_date(template: str, date: str) -> str:
    """The template with the day (YYYY-MM-DD) in place of each question for today's. Raises ConfigError."""
    day = Date.fromisoformat(date)
    fixed = DATE_CALL.sub(lambda call: repr(day.strftime(call[2])), template)
    fixed = fixed.replace(f"{ASKS_DATE} is defined", "true").replace(f"{ASKS_DATE} is not defined", "false")
    if ASKS_DATE in fixed:
        raise ConfigError(
            "data.chat_template: asks for the date in a way that cannot be fixed (strftime_now with a format that is "
            'not a text). Write strftime_now("%d %b %Y"), or the date itself, in a file of your own.'
        )
    return fixed
