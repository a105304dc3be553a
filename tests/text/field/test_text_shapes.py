"""The shapes in which people store chats: what is read, and that it becomes what transformers renders."""

import json

import datasets
import pyarrow as pa
import pytest
from damaging import complaint
from pyarrow import parquet
from tiny_text import dataset, tiny_policy, tokenizer_folder, trained_parts, write_jsonl
from transformers import AutoTokenizer

from rlinf_core import UserError
from rlinf_plugins_text.plugin import rlinf_open_dataset as open_text

TEMPLATE = """{% if tools %}<|im_start|>tools
{% for t in tools %}{{ t | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{ m.content }}
{%- for c in m.tool_calls or [] %}
<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CONCATENATING = TEMPLATE.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "x"}}}}}
TIMER = {"type": "function", "function": {"name": "timer", "parameters": {"properties": {"minutes": {"type": "y"}}}}}
ASKED, SAID = {"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}


def calling(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "ok"},
        SAID,
    ]


@pytest.fixture
def policy(tmp_path):
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    folder = tokenizer_folder(tmp_path / "tokenizer", special, eos="<|im_end|>", template=TEMPLATE)
    return tiny_policy(tokenizer=str(folder), chat_template="")


def texts(path, policy, **data):
    source = open_text(dataset(path, **data), policy, "train")
    rows = source.__getitems__(range(len(source)))
    return [policy.text_tokenizer().decode(row["tokens"].tolist()) for row in rows], rows


def theirs(policy, messages, tools=None):
    tokenizer = AutoTokenizer.from_pretrained(policy.tokenizer)
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


PLAIN = [ASKED, SAID]
WITH_CALL = [{**one, "content": one["content"] or ""} for one in calling("weather", {"city": "Rome"})]
SHAPES = {
    "messages as JSON": ({"messages": json.dumps(PLAIN)}, PLAIN, None, {}),
    "tools as JSON": ({"messages": WITH_CALL, "tools": json.dumps([WEATHER])}, WITH_CALL, [WEATHER], {}),
    "tools as JSON one by one": ({"messages": WITH_CALL, "tools": [json.dumps(WEATHER)]}, WITH_CALL, [WEATHER], {}),
    "arguments as JSON": ({"messages": calling("weather", '{"city": "Rome"}')}, WITH_CALL, None, {}),
    "tool_defs": ({"messages": WITH_CALL, "tool_defs": [WEATHER]}, WITH_CALL, [WEATHER], {}),
    "a renamed column": (
        {"messages": WITH_CALL, "functions": [WEATHER]},
        WITH_CALL,
        [WEATHER],
        {"keys": {"tools": "functions"}},
    ),
    "calls without content": ({"messages": calling("weather", {"city": "Rome"})}, WITH_CALL, None, {}),
    "an empty list of calls": ({"messages": [ASKED, {**SAID, "tool_calls": []}], "tools": []}, PLAIN, None, {}),
    "function_call": (
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
                },
                *WITH_CALL[2:],
            ]
        },
        WITH_CALL,
        None,
        {},
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ro"}, {"text": "me?", "x": None}]}, SAID]},
        PLAIN,
        None,
        {},
    ),
    "lists of a Sequence": (
        {"messages": {"role": ["user", "assistant"], "content": ["Rome?", "Sunny."]}},
        PLAIN,
        None,
        {},
    ),
    "a column of the system": (
        {"messages": PLAIN, "system": "Be brief."},
        [{"role": "system", "content": "Be brief."}, *PLAIN],
        None,
        {},
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "Rome?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "ok"},
                {"from": "gpt", "value": "Sunny."},
            ],
            "system": "Be brief.",
            "tools": json.dumps([WEATHER]),
        },
        [{"role": "system", "content": "Be brief."}, *WITH_CALL],
        [WEATHER],
        {"format": "sharegpt"},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_as_what_transformers_renders(tmp_path, policy, name):
    row, messages, tools, data = SHAPES[name]
    found, _ = texts(write_jsonl(tmp_path / "a.jsonl", [row]), policy, **data)
    assert found == [theirs(policy, messages, tools)]


def test_arguments_stay_text_for_templates_that_concatenate_them(tmp_path, policy):
    """DeepSeek-V3 and Llama distills; as transformers renders them from the text."""
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(CONCATENATING)
    rows = [{"messages": calling("weather", one)} for one in ('{"city":"Rome"}', {"city": "Rome"})]
    found, _ = texts(write_jsonl(tmp_path / "a.jsonl", rows), policy)
    assert '<call>weather {"city":"Rome"}</call>' in found[0]
    assert '<call>weather {"city": "Rome"}</call>' in found[1]


@pytest.mark.parametrize("form", ["parquet", "saved", "saved splits", "arrow"])
def test_nulls_of_arrow_do_not_reach_the_text(tmp_path, policy, form):
    """Arrow gives every struct the keys of all others (huggingface/trl#5376); texts are those of the JSON lines."""
    rows = [
        {"messages": calling("weather", {"city": "Rome"}), "tools": [WEATHER]},
        {"messages": calling("timer", {"minutes": 5}), "tools": [TIMER]},
    ]
    expected, _ = texts(write_jsonl(tmp_path / "a.jsonl", rows), policy)
    path, data = tmp_path / "rows", {}
    if form == "parquet":
        path = tmp_path / "rows.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    elif form == "saved splits":
        split = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": split, "test": split.select([0])}).save_to_disk(path)
        held_out = open_text(dataset(path, validation_split="test"), policy, "validation")
        assert len(held_out) == 1
        with pytest.raises(UserError, match=r"data\.split: .* no split 'dev' \(available: train, test\)"):
            texts(path, policy, split="dev")
    else:
        path = tmp_path / "rows.arrow"
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    found, _ = texts(path, policy, **data)
    assert found == expected
    assert "null" not in found[0]


def test_nulls_in_json_text_are_arguments(tmp_path, policy):
    rows = [{"messages": calling("weather", '{"city": null}')}]
    found, _ = texts(write_jsonl(tmp_path / "a.jsonl", rows), policy)
    assert '<call>weather {"city": null}</call>' in found[0]


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({"prompt": [ASKED], "completion": [SAID]}, ["Sunny.<|im_end|>"]),
        ({"prompt": [ASKED], "completion": "Sunny."}, ["Sunny.<|im_end|>"]),
        ({"prompt": [ASKED, SAID, ASKED], "completion": [SAID]}, ["Sunny.<|im_end|>"]),
        ({"prompt": json.dumps([ASKED]), "completion": json.dumps([SAID])}, ["Sunny.<|im_end|>"]),
        ({"prompt": "Rome?", "completion": "Sunny."}, ["Sunny.<|im_end|>"]),
        ({"prompt": "[1, 2] ", "completion": "[3]"}, ["[3]<|im_end|>"]),
    ],
)
def test_conversational_prompts_are_chats_whose_completion_is_trained(tmp_path, policy, row, trained):
    """As TRL trains them: the assistant's turns of the prompt do not count."""
    found, rows = texts(write_jsonl(tmp_path / "a.jsonl", [row]), policy, format="prompt_completion")
    assert trained_parts(rows[0], policy) == trained
    if isinstance(row["prompt"], list):
        assert found == [theirs(policy, [*row["prompt"], SAID])]


@pytest.mark.parametrize(
    ("row", "data", "says"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "a part of type 'image': only text"),
        ({"messages": "[1"}, {}, "'messages' is text that is not JSON"),
        ({"messages": PLAIN, "tools": "weather"}, {}, "'tools' is text that is not JSON"),
        ({"messages": PLAIN, "tools": 3}, {}, "'tools' must be a list of tools, not int"),
        ({"messages": [{"role": "system", "content": "a"}, *PLAIN], "system": "b"}, {}, "two different system prompts"),
        (
            {"conversations": [{"from": "function_call", "value": "look"}]},
            {"format": "sharegpt"},
            "a call, is text that is not JSON",
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, policy, row, data, says):
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: .*{says}"):
        texts(write_jsonl(tmp_path / "a.jsonl", [row]), policy, **data)


def test_a_damaged_saved_dataset_is_named(tmp_path, policy):
    datasets.Dataset.from_list([{"messages": PLAIN}]).save_to_disk(path := tmp_path / "rows")
    (arrow,) = path.glob("*.arrow")
    for file, data in (
        ("state.json", b'{"_data_files": [{"filename": "../a.arrow"}]}'),
        ("state.json", b"[]"),
        ("state.json", json.dumps({"_data_files": [{"filename": arrow.name}]}).encode()),
        (arrow.name, b"\x00" * 64),
        (arrow.name, arrow.read_bytes()[:100]),
    ):
        (path / file).write_bytes(data)
        complaint(lambda: texts(path, policy), path)
    with pytest.raises(UserError, match=arrow.name):
        texts(path, policy)
