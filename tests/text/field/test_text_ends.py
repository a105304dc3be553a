"""How turns end and texts begin, with the control tokens of model families: what is trained, and where exports stop."""

import json

import pytest
from tiny_text import dataset, tiny_policy, tokenizer_folder, trained_parts, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlinf_core import UserError
from rlinf_plugins_text.plugin import rlinf_open_dataset as open_text
from rlinf_plugins_text.weights import model_config

# GLM-4.5: no token ends a turn, the next role's does (huggingface/trl#6044, THUDM/slime#514).
GLM = """[gMASK]<sop>
{%- for m in messages %}
{%- if m.role == 'tool' %}<|observation|>
<tool_response>{{ m.content }}</tool_response>
{%- else %}<|{{ m.role }}|>
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>
{%- endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
GLM_TOKENS = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"]
# The end of the turn is outside the marks, as in templates that users mark themselves (huggingface/transformers#34172).
OUTSIDE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
<|im_end|>
{% endfor %}"""
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# gpt-oss: messages end in <|end|>, the last one in <|return|>, calls in <|call|>; only the latter two end an answer.
HARMONY = """{% for m in messages %}<|start|>{{ m.role }}
{%- if m.role == 'assistant' %}
{%- if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}
{%- if m.tool_calls %} to=functions.{{ m.tool_calls[0].function.name }}<|message|>
{{- m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- else %}<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}
{%- endif %}
{%- else %}<|message|>{{ m.content }}<|end|>{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
HARMONY_TOKENS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]
PLAIN = """{% for m in messages %}{{ 'Human: ' if m.role == 'user' else 'Assistant: ' }}{{ m.content }}
{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"""
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "cup"}}}
TWO = [
    {"role": "user", "content": "Open."},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Closed."},
]
CALLING = [
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "red"},
    {"role": "assistant", "content": "It is red."},
]


def opened(tmp_path, rows, special, template, *, eos, bos="", settings=None, **data):
    """The rows of a dataset, and the policy that reads them."""
    folder = tokenizer_folder(tmp_path / "tokenizer", special, eos=eos, bos=bos, template=template)
    policy = tiny_policy(tokenizer=str(folder), chat_template="", **(settings or {}))
    source = open_text(dataset(write_jsonl(tmp_path / "rows.jsonl", rows), **data), policy, "train")
    return source, policy


CASES = {
    "glm": (GLM, GLM_TOKENS, TWO, ["Done.<|user|>", "Closed.<|endoftext|>"]),
    "glm, calls": (
        GLM,
        GLM_TOKENS,
        CALLING,
        ['<tool_call>look {"at": "cup"}</tool_call><|observation|>', "It is red.<|endoftext|>"],
    ),
    "marks without the end": (
        OUTSIDE,
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        TWO,
        ["Done.<|im_end|>", "Closed.<|im_end|>"],
    ),
    "harmony": (
        HARMONY,
        [*HARMONY_TOKENS, "<|endoftext|>"],
        TWO,
        ["<|channel|>final<|message|>Done.<|end|>", "<|channel|>final<|message|>Closed.<|return|>"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_turn_ends_in_a_trained_token_that_exports_stop_at(tmp_path, name):
    template, special, chat, expected = CASES[name]
    source, policy = opened(tmp_path, [{"messages": chat}], special, template, eos="<|endoftext|>")
    (row,) = source.__getitems__([0])
    parts = trained_parts(row, policy)
    assert parts == expected
    if name == "harmony":
        # Inside a turn with thoughts, <|end|> does not end the answer: a reader must not stop there.
        assert policy.stops().tokens == ("<|return|>", "<|call|>", "<|endoftext|>")
        (warning,) = source.warnings()
        assert "1 of 2 turns end in '<|end|>'" in warning
        assert "does not stop at it" in warning
    else:
        assert source.warnings() == []
        assert {part.rpartition("<")[1] + part.rpartition("<")[2] for part in parts} <= set(policy.stops().tokens)


def test_turns_that_end_in_no_token_are_a_warning(tmp_path):
    source, policy = opened(tmp_path, [{"messages": TWO}], ["<|endoftext|>"], PLAIN, eos="<|endoftext|>")
    (row,) = source.__getitems__([0])
    assert trained_parts(row, policy) == ["Done.\n", "Closed.\n<|endoftext|>"]
    (warning,) = source.warnings()
    assert "1 of 2 turns end in no control token" in warning
    assert "policy.chat_template" in warning


def test_a_token_that_exports_do_not_stop_at_is_named_with_the_setting(tmp_path):
    """The template ends only long answers this way, which no small chat shows."""
    template = CHATML.replace("<|im_end|>", "{{ '<|eom|>' if m.content | length > 20 else '<|im_end|>' }}")
    special = ["<|im_start|>", "<|im_end|>", "<|eom|>"]
    chat = [TWO[0], {"role": "assistant", "content": "I have opened the drawer."}]
    source, policy = opened(tmp_path, [{"messages": chat}], special, template, eos="<|im_end|>")
    (warning,) = source.warnings()
    assert "end in '<|eom|>'" in warning
    assert "add '<|eom|>' to policy.stop_tokens" in warning
    named = policy.model_copy(update={"stop_tokens": ("<|eom|>",)})
    assert open_text(dataset(tmp_path / "rows.jsonl"), named, "train").warnings() == []
    with pytest.raises(UserError, match=r"policy\.stop_tokens: .* no token '<\|eon\|>'"):
        policy.model_copy(update={"stop_tokens": ("<|eon|>",)}).check_files()


def test_control_tokens_in_pieces_are_a_warning(tmp_path):
    """ChatML on a tokenizer that does not have its tokens: nothing could stop at the pieces."""
    source, policy = opened(tmp_path, [{"messages": TWO}], ["</s>"], CHATML, eos="</s>")
    warnings = "\n".join(source.warnings())
    assert "'<|im_start|>' is 12 tokens instead of one" in warnings
    assert "policy.tokenizer" in warnings
    assert "1 of 2 turns end in no control token" in warnings
    assert policy.stops().tokens == ("</s>",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<s>[INST] a [/INST] b</s>", "<s>[INST] a [/INST] b</s>"),
        ("a b</s>\n", "<s>a b</s>\n"),
        ("a b", "<s>a b</s>"),
    ],
)
def test_a_text_has_one_beginning_and_one_end(tmp_path, text, expected):
    """Texts that a template has rendered before (OpenRLHF/OpenRLHF#393, huggingface/alignment-handbook#127)."""
    source, policy = opened(tmp_path, [{"text": text}], ["<s>", "</s>"], "", eos="</s>", bos="<s>", format="text")
    (row,) = source.__getitems__([0])
    assert policy.text_tokenizer().decode(row["tokens"].tolist()) == expected
    assert ("not added again" in source.facts().get("already there", "")) == (text != "a b")


def test_a_chat_without_the_token_that_begins_texts_is_a_warning(tmp_path):
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    source, policy = opened(tmp_path, [{"messages": TWO}], special, CHATML, eos="<|im_end|>", bos="<s>")
    (warning,) = source.warnings()
    assert "1 text without '<s>' at the beginning" in warning
    whole = policy.model_copy(update={"chat_template": "{{ bos_token }}" + CHATML})
    assert open_text(dataset(tmp_path / "rows.jsonl"), whole, "train").warnings() == []


def test_tokens_that_are_doubled_in_a_chat_are_a_warning(tmp_path):
    chat = [TWO[0], {"role": "assistant", "content": "Done.<|im_end|>"}]
    source, _ = opened(tmp_path, [{"messages": chat}], ["<|im_start|>", "<|im_end|>"], CHATML, eos="<|im_end|>")
    (warning,) = source.warnings()
    assert "'<|im_end|>' is twice in a row in 1 text" in warning


@pytest.mark.parametrize("generation", [None, {"eos_token_id": 256, "temperature": 0.6}])
def test_a_base_model_tuned_on_chats_stops_after_export(tmp_path, generation):
    """hiyouga/LlamaFactory#7454: eos stayed <|endoftext|>, and generation never ended."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    base = tokenizer_folder(tmp_path / "base", special, eos="<|endoftext|>")
    table = tiny_policy().config | {"vocab_size": 259, "eos_token_id": 256, "bos_token_id": 256}
    model = AutoModelForCausalLM.from_config(model_config(table))
    model.save_pretrained(base)
    (base / "generation_config.json").unlink(missing_ok=True)
    if generation:
        (base / "generation_config.json").write_text(json.dumps(generation))
    policy = tiny_policy(weights=str(base), tokenizer="", config={})
    (tmp_path / "tuned").mkdir()
    tensors = {f"lm.model.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    policy.save_weights(tensors, tmp_path / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert tuned.config.eos_token_id == tuned.generation_config.eos_token_id == [258, 256]
    assert tuned.generation_config.temperature == (0.6 if generation else None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    asked = tokenizer.apply_chat_template(TWO[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    bias = {(258,): 10.0}
    out = tuned.generate(**asked, do_sample=False, max_new_tokens=9, sequence_bias=bias, pad_token_id=256)
    assert out[0, asked["input_ids"].shape[1] :].tolist() == [258]


def test_a_model_that_stops_already_keeps_its_config(tmp_path):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    base = tokenizer_folder(tmp_path / "base", special, eos="<|im_end|>", template=CHATML)
    table = tiny_policy().config | {"vocab_size": 259, "eos_token_id": 258}
    model = AutoModelForCausalLM.from_config(model_config(table))
    model.save_pretrained(base)
    policy = tiny_policy(weights=str(base), tokenizer="", config={}, chat_template="")
    assert policy.stop_ids() == (258,)
    (tmp_path / "tuned").mkdir()
    policy.save_weights({"lm.model.model.norm.weight": model.model.norm.weight.detach()}, tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["eos_token_id"] == 258
