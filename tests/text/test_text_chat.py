"""What the assistant says is found in chats of templates like the families' own, which mark nothing."""

import pytest
from tiny_text import PLANS
from transformers import AutoTokenizer

from rlinf_core import UserError
from rlinf_plugins_text.rows.chat import CHATML, ChatTemplate

QWEN3 = """\
{%- set ns = namespace(query=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role != 'assistant' %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- else %}
{%- set content = message.content %}{%- set thoughts = '' %}
{%- if '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.query and (loop.last or thoughts) %}
{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
THINKING = QWEN3.removesuffix("{%- endif %}\n") + "{{- '<think>\\n' }}{%- endif %}\n"
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}
{{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}
"""
MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (system if m == last else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}
"""
PHI3 = """\
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
SEEING = """\
{% for m in messages %}{{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = "<think>\nwhere is it?\n</think>\n\nHere."


def chat(*said, system=False):
    roles = ("user", "assistant") * len(said)
    return [SYSTEM] * system + [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


TWO = chat("Open it.", "Done.", "And now?", " Close it. \n")
THOUGHTS = chat("Where?", THOUGHT, "Sure?", THOUGHT)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "cup"}}}]}
CALLING = [*chat("Look."), CALL, {"role": "tool", "content": "red"}, {"role": "assistant", "content": "It is red."}]
CASES = {
    "qwen3": (QWEN3, TWO, ["Done.<|im_end|>", "<think>\n\n</think>\n\n Close it. \n<|im_end|>"]),
    "qwen3, thoughts": (QWEN3, THOUGHTS, ["Here.<|im_end|>", f"{THOUGHT}<|im_end|>"]),
    "qwen3, a tool": (
        QWEN3,
        CALLING,
        [
            '<tool_call>\n{"name": "look", "arguments": {"at": "cup"}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nIt is red.<|im_end|>",
        ],
    ),
    "asked to think": (THINKING, THOUGHTS, ["Here.<|im_end|>", f"{THOUGHT.removeprefix('<think>\n')}<|im_end|>"]),
    "llama3": (LLAMA3, [SYSTEM, *TWO], ["Done.<|eot_id|>", "Close it.<|eot_id|>"]),
    "gemma": (GEMMA, TWO, ["Done.<end_of_turn>", "Close it.<end_of_turn>"]),
    "mistral": (MISTRAL, chat("Open it.", "Done.", "And?", "Close it.", system=True), [" Done.</s>", " Close it.</s>"]),
    "phi3": (PHI3, chat("Open it.", "Done.", "And?", "Close it."), ["Done.<|end|>", "Close it.<|end|>\n</s>"]),
}


@pytest.mark.parametrize("name", CASES)
def test_turns_are_found_in_the_families_templates(name):
    template, messages, expected = CASES[name]
    text, spans = ChatTemplate(template, TOKENS).spans(messages)
    assert [text[begin:end] for begin, end in spans] == expected


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_that_of_transformers(name):
    template, messages, _ = CASES[name]
    theirs = AutoTokenizer.from_pretrained(PLANS, **TOKENS)
    theirs.chat_template = template
    ours = ChatTemplate(template, TOKENS)
    assert ours.spans(messages)[0] == theirs.apply_chat_template(messages, tokenize=False)
    for ask in (False, True):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        assert ours.render(messages, ask=ask) == expected


def test_words_that_occur_elsewhere_are_not_mistaken():
    messages = chat("Done.", "Done.", "Done.<|im_end|>\n<|im_start|>assistant\nDone.", "Done.")
    text, spans = ChatTemplate(QWEN3, TOKENS).spans(messages)
    assert [text[begin:end] for begin, end in spans] == ["Done.<|im_end|>", "<think>\n\n</think>\n\nDone.<|im_end|>"]
    assert spans[0][0] == text.index("assistant\nDone.") + len("assistant\n")
    assert spans[1][1] == len(text) - 1


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (SEEING, TWO, "in message 1 cannot be found"),  # It drops texts that come without a type.
        (LLAMA3, CALLING, "in message 1 cannot be found"),  # It drops calls of tools.
        (CHATML, CALLING, "writes no tools; .*a Jinja file that takes such messages and writes tools"),
        (GEMMA, [SYSTEM, *TWO], "System role not supported"),
    ],
)
def test_a_template_that_loses_words_is_refused(template, messages, says):
    with pytest.raises(UserError, match=says):
        ChatTemplate(template, TOKENS).spans(messages)
