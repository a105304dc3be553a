"""Text becomes tokens: formats, what is trained, what is cut, held out and packed, and errors with their place."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
from distributions import ROOT
from pyarrow import parquet
from pydantic import ValidationError
from tiny_text import PLANS, dataset, tiny_policy, write_jsonl
from transformers import AutoTokenizer

from rlinf_core import UserError
from rlinf_core.testing import check_dataset
from rlinf_core.testing.samples import same
from rlinf_plugins_text.plugin import rlinf_open_dataset as open_text
from rlinf_plugins_text.rows.source import pack
from rlinf_plugins_text.rows.tokenizer import load_tokenizer

CHAT = [
    {"role": "system", "content": "You are a robot."},
    {"role": "user", "content": "Open the drawer."},
    {"role": "assistant", "content": "1. Open the drawer."},
    {"role": "user", "content": "Grasp the cup."},
    {"role": "assistant", "content": "1. Grasp the cup."},
]
PLAIN_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = "{% for m in messages %}{{ m.content }}{% if loop.last %} (last){% endif %}{% endfor %}"


def rows_of(path, policy=None, split="train", **settings):
    source = open_text(dataset(path, **settings), policy or tiny_policy(), split)
    return source.__getitems__(range(len(source)))


def whole_text(row):
    return tiny_policy().text_tokenizer().decode(row["tokens"].tolist())


def trained_text(row, policy=None):
    """What is trained, piece by piece."""
    tokenizer = (policy or tiny_policy()).text_tokenizer()
    edges = np.flatnonzero(np.diff(row["trained"], prepend=False, append=False)).tolist()
    pieces = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(row["tokens"][begin:end].tolist()) for begin, end in pieces]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    table = [
        {"prompt": "Open the drawer.\n", "completion": "1. Open, then “grasp”."},
        {"prompt": "b", "completion": "c"},
    ]
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, table)
    elif suffix == "json":
        path.write_text(json.dumps(table), encoding="utf-8")
    elif suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(table), path)
    else:
        path.write_text('prompt,completion\n"Open the drawer.\n","1. Open, then “grasp”."\nb,c\n', encoding="utf-8")
    for where in (path, tmp_path):
        rows = rows_of(where, format="prompt_completion")
        assert [trained_text(row) for row in rows] == [["1. Open, then “grasp”.<|im_end|>"], ["c<|im_end|>"]]


def test_paragraphs_of_a_text_file_are_texts(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Open the drawer.\nGrasp.\n\n\nClose it.\n", encoding="utf-8")
    assert [whole_text(row) for row in rows_of(path, format="text")] == [
        "Open the drawer.\nGrasp.<|im_end|>",
        "Close it.<|im_end|>",
    ]


@pytest.mark.parametrize("template", ["chatml", PLAIN_CHATML])
def test_the_assistants_words_are_trained(tmp_path, template):
    """Marked by the template, or found."""
    policy = tiny_policy(chat_template=template)
    (row,) = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), policy)
    assert trained_text(row) == ["1. Open the drawer.<|im_end|>", "1. Grasp the cup.<|im_end|>"]
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]} for m in CHAT
    ]
    (other,) = rows_of(
        write_jsonl(tmp_path / "b.jsonl", [{"chat": sharegpt}]),
        policy,
        format="sharegpt",
        keys={"conversations": "chat"},
    )
    assert same(other | {"index": 0}, row)


@pytest.mark.parametrize("template", ["chatml", PLAIN_CHATML])
def test_tokens_are_those_of_transformers(tmp_path, template):
    policy = tiny_policy(chat_template=template)
    (row,) = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), policy)
    theirs = AutoTokenizer.from_pretrained(PLANS)
    theirs.chat_template = policy.text_tokenizer().template_source
    out = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=template == "chatml")
    assert row["tokens"].tolist() == out["input_ids"]
    if template == "chatml":
        assert row["trained"].tolist() == [bool(one) for one in out["assistant_masks"]]


def test_prompt_and_completion_in_the_template_are_a_chat(tmp_path):
    asked, said = CHAT[1], CHAT[2]
    (chat,) = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": [asked, said]}]))
    path = write_jsonl(tmp_path / "b.jsonl", [{"q": asked["content"], "a": said["content"]}])
    keys = {"prompt": "q", "completion": "a"}
    assert same(rows_of(path, format="prompt_completion", as_chat=True, keys=keys)[0], chat)


def test_a_template_that_ends_turns_by_later_messages_is_refused_with_the_place(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: .* message 2 .*chatml.*generation"):
        rows_of(path, tiny_policy(chat_template=FORGETFUL))


@pytest.mark.parametrize(
    ("row", "settings", "says"),
    [
        ({"massages": CHAT}, {}, "no 'messages'; found: massages"),
        ({"messages": "hello"}, {}, "'messages' must be a non-empty list of messages"),
        ({"messages": [{"role": "user"}]}, {}, r"no 'content' \(message 0\)"),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "'content' of message 0 must be text, not int 3"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, {"format": "sharegpt"}, "'narrator', a speaker"),
        ({"prompt": None, "completion": "x"}, {"format": "prompt_completion"}, "'prompt' must be text, not NoneType"),
    ],
)
def test_a_wrong_row_is_named_with_file_and_line(tmp_path, row, settings, says):
    good = {"messages": CHAT, "conversations": [{"from": "gpt", "value": "x"}], "prompt": "a", "completion": "b"}
    path = write_jsonl(tmp_path / "data.jsonl", [good, row])
    with pytest.raises(UserError, match=rf"data\.jsonl, line 2: .*{says}"):
        rows_of(path, **settings)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty: it has no rows"),
        (b"\r\n\n", "is empty: it has no rows"),
        (b"[1]\n", "line 1: a line must be an object of columns, not list"),
        (b'{"text": "a\\ud800b"}\n', "line 1: the text is not valid Unicode"),
        ('{"text": "é"}'.encode("latin-1"), "is not UTF-8 text"),
        (b'{"text": ""}\n' * 2, "has no token to train"),
    ],
)
def test_files_without_texts_are_told(tmp_path, data, says):
    (tmp_path / "data.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=says):
        rows_of(tmp_path / "data.jsonl", format="text", validation_fraction=0.1)


def test_marks_and_line_ends_of_windows_are_no_text(tmp_path):
    (tmp_path / "data.jsonl").write_bytes("\ufeff".encode() + b'{"text": "a b"}\r\n{"text": "c"}\r\n')
    assert [whole_text(row) for row in rows_of(tmp_path / "data.jsonl", format="text")] == [
        "a b<|im_end|>",
        "c<|im_end|>",
    ]


@pytest.mark.parametrize("setting", ["split", "revision", "subset", "validation_split"])
def test_settings_of_the_hub_are_refused_for_files(tmp_path, setting):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=rf"data\.{setting} is for datasets on the hub"):
        open_text(dataset(path, format="text", **{setting: "other"}), tiny_policy(), "train")


def test_what_is_no_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a b"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.jsonl, line 2 is not valid JSON"):
        rows_of(path, format="text")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keys": {"prompt": "q"}}, "format 'messages' has no prompt"),
        ({"as_chat": True}, "as_chat is for format"),
        ({"format": "text", "roles": {"a": "user"}}, "roles are for chats"),
        (
            {"validation_fraction": 0.1, "validation_files": ["a"]},
            "only one of validation_fraction, validation_files",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, says):
    with pytest.raises(ValidationError, match=says):
        dataset("x", **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weights": ""}, "policy.weights is missing"),
        ({"config": {}}, "needs policy.config with a model_type"),
        ({"tokenizer": ""}, "needs policy.tokenizer"),
        ({"packing": True, "attention": "padded"}, "would see one another"),
    ],
)
def test_policies_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ValidationError, match=says):
        tiny_policy(**settings)


def lengths_of(rows):
    return [len(row["tokens"]) for row in rows]


def test_long_texts_are_cut_split_or_dropped_as_asked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b c d e f g h"}, {"text": "a b"}])
    whole = lengths_of(rows_of(path, tiny_policy(), format="text"))
    most = whole[0] - 2
    rows = {o: rows_of(path, tiny_policy(max_length=most, overlong=o), format="text") for o in ("cut", "split", "drop")}
    assert {o: lengths_of(r) for o, r in rows.items()} == {
        "cut": [most, whole[1]],
        "split": [most, 2, whole[1]],
        "drop": [whole[1]],
    }
    assert rows["split"][1]["trained"].tolist() == [False, True]
    facts = tiny_policy(max_length=most).describe(rows["cut"])
    assert f"{whole[0]} in the longest; 1 of them cut at policy.max_length = {most}" in facts["texts"]


def test_a_cut_that_leaves_nothing_to_train_is_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(UserError, match=r"has no token to train: .*policy\.max_length = 8"):
        rows_of(path, tiny_policy(max_length=8))


def test_texts_that_are_left_out_are_counted(tmp_path):
    silent = [CHAT[1]]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[1:3]}, {"messages": silent}, {"messages": CHAT}])
    for policy in (tiny_policy(), tiny_policy(packing=True)):
        silent_one = f"1 text without a trained token (the assistant says nothing), first: {path}, line 2"
        warning = f"warning: 33% of 3 texts are left out: {silent_one}"
        assert policy.describe(rows_of(path, policy))["left out"] == warning
    short = tiny_policy(max_length=60, overlong="drop")
    longer = f"1 text longer than policy.max_length = 60, first: {path}, line 3"
    warning = f"warning: 67% of 3 texts are left out: {silent_one}; {longer}"
    assert short.describe(rows_of(path, short))["left out"] == warning
    assert "left out" not in tiny_policy().describe(rows_of(write_jsonl(path, [{"messages": CHAT}])))


def test_conversations_without_an_answer_are_named_as_the_cause(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[:2]}] * 3)
    with pytest.raises(
        UserError, match=r"3 texts without a trained token \(the assistant says nothing\).*line 1; data.roles"
    ):
        rows_of(path)


def test_tools_beside_messages_are_the_templates(tmp_path):
    template = "{% if tools %}may call {{ tools[0].name }}\n{% endif %}" + PLAIN_CHATML
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[1:3], "tools": [{"name": "look"}]}])
    (row,) = rows_of(path, tiny_policy(chat_template=template))
    assert whole_text(row).startswith("may call look\n<|im_start|>user")
    assert trained_text(row) == ["1. Open the drawer.<|im_end|>"]
    with pytest.raises(UserError, match="writes no tools"):
        rows_of(path)


TOOLS = re.search(r"^```jinja\n(.*?)^```", (ROOT / "docs" / "text.md").read_text("utf-8"), re.M | re.DOTALL)[1]
CALLS = [
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
    {"role": "tool", "content": "red"},
]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
PAIR = {"prompt": "a", "completion": "b"}
GEMMA = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN_CHATML
ADVICE = [
    # row, chat_template, settings, what the message says, settings that follow it
    ({"messages": CALLS}, "chatml", {}, 'docs/text.md, "Tools", has one', {"chat_template": TOOLS}),
    ({"messages": CALLS, "tools": [{"name": "look"}]}, "chatml", {}, '"Tools", has one', {"chat_template": TOOLS}),
    ({"messages": CALLS}, PLAIN_CHATML, {}, 'docs/text.md, "Tools", has one', {"chat_template": TOOLS}),
    ({"messages": CHAT}, GEMMA, {}, 'set policy.chat_template to "chatml"', {"chat_template": "chatml"}),
    ({"messages": CHAT}, "", {}, 'set policy.chat_template to "chatml"', {"chat_template": "chatml"}),
    (PAIR, "", {"format": "prompt_completion", "as_chat": True}, "data.as_chat = false", {"as_chat": False}),
    ({"conversations": SHAREGPT}, "chatml", {}, 'set data.format = "sharegpt"', {"format": "sharegpt"}),
    ({"messages": CHAT}, "chatml", {"format": "sharegpt"}, 'set data.format = "messages"', {"format": "messages"}),
    (PAIR, "chatml", {}, 'set data.format = "prompt_completion"', {"format": "prompt_completion"}),
    ({"text": "a b"}, "chatml", {}, 'set data.format = "text"', {"format": "text"}),
    (
        {"messages": SHAREGPT},
        "chatml",
        {"format": "sharegpt"},
        "data.keys renames",
        {"keys": {"conversations": "messages"}},
    ),
    (
        {"messages": [CHAT[1], {"role": "model", "content": "b"}]},
        "chatml",
        {},
        'data.roles = { speaker = "assistant" }',
        {"roles": {"model": "assistant"}},
    ),
    ({"messages": CHAT[:2]}, "chatml", {}, 'data.loss_on = "all"', {"loss_on": "all"}),
    (
        {"prompt": CHAT[:2], "completion": CHAT[2:3]},
        "chatml",
        {},
        'set data.format = "prompt_completion"',
        {"format": "prompt_completion"},
    ),
]


@pytest.mark.parametrize(("row", "template", "settings", "says", "then"), ADVICE)
def test_what_a_message_advises_works(tmp_path, row, template, settings, says, then):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError) as refused:
        rows_of(path, tiny_policy(chat_template=template), **settings)
    assert says in str(refused.value)
    template = then.get("chat_template", template)
    settings = {key: value for key, value in (settings | then).items() if key != "chat_template"}
    (sample,) = rows_of(path, tiny_policy(chat_template=template), **settings)
    assert sample["trained"].any()


def test_packs_hold_every_text_once_and_are_full():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    packs = pack(lengths, 64)
    assert sorted(np.concatenate(packs).tolist()) == list(range(500))
    sizes = [int(lengths[texts].sum()) for texts in packs]
    assert max(sizes) <= 64
    assert len(packs) <= 1.06 * lengths.sum() / 64 + 1


def test_a_packed_row_is_its_texts_one_after_the_other(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT[1:3]}, {"messages": CHAT[3:]}])
    apart = rows_of(path)
    (packed,) = rows_of(path, tiny_policy(packing=True))
    assert packed["tokens"].tolist() == [token for row in apart for token in row["tokens"]]
    assert packed["trained"].tolist() == [one for row in apart for one in row["trained"]]
    assert packed["document_lengths"].tolist() == lengths_of(apart)
    batch = tiny_policy(packing=True, max_length=128).collate([packed])
    first, second = lengths_of(apart)
    expected = [*range(first), *range(second), *range(128 - first - second)]
    assert batch["positions"][0].tolist() == expected


def test_held_out_texts_are_not_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"text number {n}"} for n in range(40)])
    parts = {}
    for split in ("train", "validation"):
        source = open_text(dataset(path, format="text", validation_fraction=0.25), tiny_policy(packing=True), split)
        parts[split] = {int(text) for text in source.texts}
    assert len(parts["validation"]) == 10
    assert parts["train"] == set(range(40)) - parts["validation"]


def test_files_may_be_held_out(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "trained on"}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "held out"}])
    settings = {"format": "text", "validation_files": ["test.jsonl"]}
    assert whole_text(rows_of(tmp_path, **settings)[0]) == "trained on<|im_end|>"
    assert whole_text(rows_of(tmp_path, split="validation", **settings)[0]) == "held out<|im_end|>"


def test_tokens_are_made_anew_when_the_data_change(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two"}])
    first = open_text(dataset(path, format="text"), tiny_policy(), "train")
    again = open_text(dataset(path, format="text"), tiny_policy(), "train")
    assert again.fingerprint() == first.fingerprint()
    os.utime(path, (0, 0))
    assert open_text(dataset(path, format="text"), tiny_policy(), "train").fingerprint() == first.fingerprint()
    write_jsonl(path, [{"text": "one two three"}])
    assert open_text(dataset(path, format="text"), tiny_policy(), "train").fingerprint() != first.fingerprint()


def test_a_source_travels_without_its_tokens(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 3000}])
    source = open_text(dataset(path, format="text"), tiny_policy(max_length=8000), "train")
    (row,) = source.__getitems__([0])
    data = pickle.dumps(source)
    assert len(data) < 3000
    assert same(pickle.loads(data).__getitems__([0])[0], row)


def test_the_dataset_conforms(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}] * 3)
    check_dataset(dataset(path), policy=tiny_policy())


def test_the_description_shows_what_is_trained(tmp_path):
    policy = tiny_policy()
    facts = policy.describe(rows_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}]), policy))
    assert "<|im_start|>assistant↵⟦1. Open the drawer.<|im_end|>⟧↵<|im_start|>user" in facts["a sample"]


def test_a_tokenizer_that_begins_texts_does_so(tmp_path):
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(PLANS / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text((PLANS / "tokenizer_config.json").read_text())
    assert load_tokenizer(tmp_path, "").start == (1,)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "on the table"}])
    (row,) = rows_of(path, tiny_policy(tokenizer=str(tmp_path)), format="text")
    assert row["tokens"][0] == 1
    assert trained_text(row) == ["on the table<|im_end|>"]


@pytest.mark.parametrize("name", ["tokens.npy", "trained.npy", "ends.npy", "where.txt", None])
def test_damaged_tokens_in_the_cache_are_named_and_written_again(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two three"}])
    source = open_text(dataset(path, format="text"), tiny_policy(), "train")
    (row,) = source.__getitems__([0])
    file = source.store.entry.file(name) if name else source.store.entry.manifest
    file.write_bytes(bytes(file.stat().st_size))
    again = open_text(dataset(path, format="text"), tiny_policy(), "train")
    assert same(again.__getitems__([0])[0], row)
    assert again.fingerprint() == source.fingerprint()
    said = capsys.readouterr().err
    assert str(file) in said
    assert "the cache is damaged" in said
    assert not list((tmp_path / "cache").glob("text/.*"))


def test_a_cache_that_is_removed_during_a_run_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one two three"}])
    source = open_text(dataset(path, format="text"), tiny_policy(), "train")
    source.__getitems__([0])
    shutil.rmtree(tmp_path / "cache")
    source.__getitems__([0])  # What is open stays.
    with pytest.raises(UserError, match="was removed or damaged while the run was using it"):
        pickle.loads(pickle.dumps(source)).__getitems__([0])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "txt", "arrow"])
def test_what_is_not_a_file_is_refused_at_once(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    os.mkfifo(path)
    for repo_id in (path, tmp_path):
        with pytest.raises(UserError, match=rf"a\.{suffix} cannot be read: it is a named pipe, not a file"):
            open_text(dataset(repo_id, format="text"), tiny_policy(), "train")


def test_parquet_bombs_are_refused(tmp_path):
    zeros = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2 * 10**7, np.int32)), pa.array([0]))
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pa.table({"text": zeros}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match=r"bomb.parquet has .* kB, but its columns take 0.16 GB in memory"):
        open_text(dataset(path, format="text"), tiny_policy(), "train")
