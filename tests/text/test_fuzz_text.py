"""Texts, tokenizers and exported folders with damage: one message that names the file."""

import io
import json
import shutil

import pyarrow as pa
import pytest
from damaging import complaint, damaged, damaged_bytes, examples, json_texts
from distributions import repository_plugins
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tiny_text import PLANS, dataset, tiny_policy

from rlinf_core.inference import load_policy
from rlinf_plugins_text.plugin import rlinf_open_dataset as open_text
from rlinf_plugins_text.rows.tokenizer import TemplateReader, TextTokenizer
from rlinf_plugins_text.weights.folder import config_table, weight_files

ROWS = [
    {"messages": [{"role": "user", "content": "Open."}, {"role": "assistant", "content": "1. Open."}], "tools": None},
    {"messages": [{"role": "user", "content": "Grasp."}, {"role": "assistant", "content": "1. Grasp."}], "tools": None},
]


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_of(rows):
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def arrow_of(rows):
    table, out = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


CSV = b'prompt,completion\n"Open the drawer.\n","1. Open"\nb,c\n'
FILES = {
    "jsonl": st.one_of(damaged(ROWS).map(lines_of), damaged_bytes(lines_of(ROWS))),
    "json": json_texts(ROWS),
    "parquet": damaged_bytes(parquet_of(ROWS)),
    "arrow": damaged_bytes(arrow_of(ROWS)),
    "csv": damaged_bytes(CSV),
    "txt": damaged_bytes("Öffne die Lade.\n\nGreif".encode()),
}
FORMATS = {"csv": "prompt_completion", "txt": "text"}


@pytest.mark.parametrize("suffix", FILES)
def test_texts(suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "cache"))
    path, policy = tmp_path / f"data.{suffix}", tiny_policy()
    config = dataset(path, format=FORMATS.get(suffix, "messages"))

    def read():
        source = open_text(config, policy, "train")
        source.__getitems__(range(len(source)))

    @examples(12)
    @given(FILES[suffix])
    def fuzz(data):
        path.write_bytes(data)
        complaint(read, path, "data.repo_id", "chat")

    fuzz()
    assert not list((tmp_path / "cache").glob("text/.*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer's files, to be damaged."""
    return shutil.copytree(PLANS, tmp_path_factory.mktemp("model") / "folder")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(name, folder):
    file = folder / name
    whole = file.read_bytes()
    table = json.loads(whole) | ({"chat_template": "{{ messages }}"} if "config" in name else {})

    def read():
        tokenizer = TextTokenizer(folder)
        tokenizer.encode(["Open the drawer."])
        _ = tokenizer.size, tokenizer.start, tokenizer.end, tokenizer.chat

    @examples(15)
    @given(st.one_of(json_texts(table), damaged_bytes(whole)))
    def fuzz(data):
        file.write_bytes(data)
        complaint(read, folder, "chat_template")

    fuzz()
    file.write_bytes(whole)


PIECES = ("{{ messages }}", "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{{ 1 / 0 }}")
PIECES += ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{% include '/etc/passwd' %}")
PIECES += (
    "{{ self.__init__.__globals__ }}",
    "{{ 'a' * 10**12 }}",
    "{{ range(10**9) }}",
    "{% generation %}",
    "{{ x.y }}",
)
PIECES += ("{{ raise_exception('no') }}", "{{ strftime_now(1) }}", "{{ messages | tojson(indent='x') }}", "{% if", "}}")


def test_chat_templates():
    messages = ROWS[0]["messages"]

    @examples(60)
    @given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join))
    def fuzz(source):
        complaint(lambda: TemplateReader(source, {}, {}, "").read(messages), "chat")

    fuzz()


def test_folders_of_models(tmp_path):
    names = st.sampled_from(["model.safetensors", "../x", "/etc/passwd", None, 3, []])
    indices = st.dictionaries(st.sampled_from("ab"), names).map(lambda some: json.dumps({"weight_map": some}).encode())

    @examples(25)
    @given(st.one_of(indices, json_texts({"weight_map": {"a": "model.safetensors"}})))
    def fuzz(data):
        (tmp_path / "model.safetensors.index.json").write_bytes(data)
        complaint(lambda: weight_files(tmp_path, str(tmp_path)), tmp_path)

    fuzz()

    @examples(12)
    @given(json_texts({"model_type": "qwen3"}))
    def fuzz_config(data):
        (tmp_path / "config.json").write_bytes(data)
        complaint(lambda: config_table(tmp_path, "policy.weights") | {}, tmp_path)

    fuzz_config()


DESCRIPTION = {
    "format": 1,
    "policy": {"type": "pi05", "variant": "dummy", "action_dim": 4, "weights": "random"},
    "data": {"config_name": "pi05_metaworld", "repo_id": "x"},
    "files": {"tokenizer": "small_tokenizer.model"},
    "sha256": {},
}


def test_exported_folders(tmp_path):
    plugins = repository_plugins()

    @examples(25)
    @given(json_texts(DESCRIPTION))
    def fuzz(data):
        (tmp_path / "rlinf.json").write_bytes(data)
        complaint(lambda: load_policy(tmp_path, plugins=plugins), tmp_path, "unknown", "tokenizer", "statistics")

    fuzz()
