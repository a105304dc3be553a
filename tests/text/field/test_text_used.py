"""What data say reaches the model: words, tools and thoughts are in the text, weights count, the rest is named."""

import pytest
from tiny_text import dataset, tiny_policy, tokenizer_folder, trained_parts, write_jsonl

from rlinf_core import UserError
from rlinf_plugins_text.plugin import rlinf_open_dataset as open_text
from rlinf_plugins_text.rows.chat import ChatTemplate

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + "{{ m.content }}" + TAIL
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + PLAIN.removeprefix("{% for m in messages %}")
THINKING = (
    HEAD + "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content.split('</think>')[-1] }}" + TAIL
)
SWITCHED = (
    "{% if enable_thinking is defined and not enable_thinking %}<|im_start|>/no_think<|im_end|>{% endif %}" + PLAIN
)
MARKED = HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
MARKED += "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
ASKED, SAID = {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}
WRONG = {"role": "assistant", "content": "Rainy."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def opened(tmp_path, rows, template, settings=None, **data):
    special = ["<|im_start|>", "<|im_end|>"]
    folder = tokenizer_folder(tmp_path / "tokenizer", special, eos="<|im_end|>", template=template)
    policy = tiny_policy(tokenizer=str(folder), chat_template="", **(settings or {}))
    return open_text(dataset(write_jsonl(tmp_path / "a.jsonl", rows), **data), policy, "train"), policy


@pytest.mark.parametrize(
    ("template", "row", "says"),
    [
        (PLAIN, {"messages": [ASKED, SAID], "tools": [TOOL]}, "leaves out a tool: 'weather'.*policy.chat_template"),
        (NO_SYSTEM, {"messages": [{"role": "system", "content": "Be brief."}, ASKED, SAID]}, "content of message 0"),
        (NO_SYSTEM, {"messages": [ASKED, SAID], "system": "Be brief."}, "content of message 0 .system.: 'Be brief.'"),
        (
            THINKING,
            {"messages": [ASKED, {**SAID, "reasoning_content": "I look."}]},
            "leaves out reasoning_content of message 1.*It reads 'thinking': set data.keys",
        ),
        (
            THINKING,
            {"messages": [ASKED, {**SAID, "content": "<think>I look.</think>Sunny."}]},
            "leaves out the thoughts",
        ),
        # The word is elsewhere in the text, and yet the message is not.
        (NO_SYSTEM, {"messages": [{"role": "system", "content": "Sunny."}, ASKED, SAID]}, "content of message 0"),
        (MARKED, {"messages": [ASKED, {**SAID, "tool_calls": [TOOL]}]}, "leaves out a call of message 1"),
    ],
)
def test_a_row_of_which_words_are_lost_is_refused(tmp_path, template, row, says):
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: the chat template .*{says}"):
        opened(tmp_path, [row], template)


def test_keys_rename_the_thoughts(tmp_path):
    row = {"messages": [ASKED, {**SAID, "reasoning_content": "I look."}]}
    source, policy = opened(tmp_path, [row], THINKING, keys={"thinking": "reasoning_content"})
    assert trained_parts(source.__getitems__([0])[0], policy) == ["<think>I look.</think>Sunny.<|im_end|>"]


def test_thoughts_that_a_template_drops_from_earlier_turns_are_reported(tmp_path):
    template = THINKING.replace("{% if m.thinking %}", "{% if m.thinking and loop.last %}")
    chat = [ASKED, {**SAID, "thinking": "I look."}] * 2
    source, policy = opened(tmp_path, [{"messages": chat}] * 3, template)
    assert trained_parts(source.__getitems__([0])[0], policy)[0] == "Sunny.<|im_end|>"
    assert source.facts()["not used"].startswith("thinking of earlier turns (3 texts, first: ")


def test_columns_and_keys_that_are_not_used_are_named(tmp_path):
    row = {"messages": [{**ASKED, "name": "Ann"}, SAID], "id": 7, "source": "web", "empty": None}
    source, _ = opened(tmp_path, [row, {"messages": [ASKED, SAID], "id": 8}], PLAIN)
    unused = source.facts()["not used"]
    assert f"column 'id' (2 texts, first: {tmp_path}/a.jsonl, line 1)" in unused
    assert "column 'source' (1 text" in unused
    assert "key 'name' of messages (1 text" in unused
    assert "empty" not in unused
    source, _ = opened(tmp_path, [{"text": "a", "messages": [ASKED]}], PLAIN, format="text")
    assert "column 'messages'" in source.facts()["not used"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_weights_of_messages_are_obeyed(tmp_path, template, key):
    """OpenAI and Mistral have `weight`, axolotl `train` or `training`, ms-swift `loss` (axolotl#1703)."""
    chat = [ASKED, {**WRONG, key: 0}, {**ASKED, key: None}, {**SAID, key: 1}]
    source, policy = opened(tmp_path, [{"messages": chat}], template)
    assert trained_parts(source.__getitems__([0])[0], policy) == ["Sunny.<|im_end|>"]
    source, policy = opened(tmp_path, [{"messages": chat}], template, loss_on="all")
    first, second = trained_parts(source.__getitems__([0])[0], policy)
    assert first.endswith("assistant\n")
    assert second.lstrip().startswith("<|im_start|>user")
    assert second.rstrip().endswith("Sunny.<|im_end|>")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({**SAID, "weight": 0.5}, "'weight' of message 1 is float 0.5: a message counts"),
        ({**ASKED, "train": True}, "'train' of message 1 says that it counts, but only the assistant's"),
        ({**SAID, "training_detail": [{"begin_offset": 0}]}, "'training_detail', which selects parts"),
    ],
)
def test_weights_that_cannot_be_obeyed_are_refused(tmp_path, message, says):
    with pytest.raises(UserError, match=says):
        opened(tmp_path, [{"messages": [ASKED, message, SAID]}], PLAIN)


def test_arguments_of_the_template_come_from_the_settings_and_a_column(tmp_path):
    rows = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, SAID], "chat_template_kwargs": {"enable_thinking": True}}]
    settings = {"chat_template_kwargs": {"enable_thinking": False}}
    source, policy = opened(tmp_path, rows, SWITCHED, settings)
    found = [policy.text_tokenizer().decode(row["tokens"].tolist()) for row in source.__getitems__([0, 1])]
    assert ["/no_think" in text for text in found] == [True, False]
    # Another value gives other texts, from a cache of their own.
    other = open_text(dataset(tmp_path / "a.jsonl"), policy.model_copy(update={"chat_template_kwargs": {}}), "train")
    assert other.fingerprint() != source.fingerprint()
    with pytest.raises(UserError, match=r"policy\.chat_template_kwargs: .* 'enable_thinkin'; did you mean"):
        policy.model_copy(update={"chat_template_kwargs": {"enable_thinkin": False}}).check_files()
    rows[1]["chat_template_kwargs"] = {"speed": 1}
    source, _ = opened(tmp_path, rows, SWITCHED)
    assert "key 'speed' of 'chat_template_kwargs'" in source.facts()["not used"]


def test_texts_that_a_template_escapes_or_trims_are_not_lost():
    template = (
        HEAD + "{% if m.role == 'tool' %}{{ {'out': m.content} | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    )
    chat = [ASKED, {"role": "tool", "content": 'a "quoted"\nline é'}, {**SAID, "content": "\n Sunny. "}]
    assert ChatTemplate(template + TAIL, {}).read(chat).dropped == ()
    # This one changes its output if words change: they are searched instead.
    ascii_only = template.replace("| tojson", "| tojson(ensure_ascii=true)")
    assert ChatTemplate(ascii_only + TAIL, {}).read(chat).dropped == ()
