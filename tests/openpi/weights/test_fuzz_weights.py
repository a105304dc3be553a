"""Weights, statistics, tokenizers and exported folders with damage: one message that names the file, bounded memory."""

import json
import struct
from pathlib import Path

import pytest
import torch
from damaging import complaint, damaged, damaged_bytes, examples, json_texts
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_pi0 import PI0, published_state, shapes_of

from rlinf_core.data.normalize import load_norm_stats
from rlinf_core.data.statistics.importers import read_lerobot, read_openpi
from rlinf_plugins_openpi.inputs.tokenizer import SMALL_MODEL, PromptTokenizer, load_processor
from rlinf_plugins_openpi.weights.convert import convert
from rlinf_plugins_openpi.weights.source import PublishedWeights


@pytest.fixture(scope="module")
def shapes():
    return shapes_of(PI0)


@pytest.fixture(scope="module")
def weights():
    """A whole safetensors file."""
    return save(published_state(PI0))


def load(path, shapes):
    source = PublishedWeights(path, PI0)
    source.check(shapes)
    for name in list(shapes)[:5]:
        assert torch.as_tensor(source.tensor(name)).shape is not None


def with_header(data, table):
    """The safetensors file with another header before its numbers."""
    size = struct.unpack("<Q", data[:8])[0]
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def header_of(data):
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


OFFSETS = ([0, 0], [0, 2**60], [-8, 0], [8, 4], [0, 8], 7, [0], ["0", "8"], [0.5, 8])
SHAPES = ([2**62], [2**31, 2**31, 2**31], [-1], [], [0], "4", [1e9], [None])
KINDS = ("F32", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "", None, "x", 4)


@st.composite
def headers(draw, data):
    table = header_of(data)
    name = draw(st.sampled_from(sorted(table)))
    entry = table[name]
    match draw(st.integers(0, 4)):
        case 0:
            entry["data_offsets"] = draw(st.sampled_from(OFFSETS))
        case 1:
            entry["shape"] = draw(st.sampled_from(SHAPES))
        case 2:
            entry["dtype"] = draw(st.sampled_from(KINDS))
        case 3:
            entry["shape"] = draw(st.sampled_from(SHAPES))
            entry["data_offsets"] = draw(st.sampled_from(OFFSETS))
        case _:
            return draw(damaged(table))
    return table


def test_safetensors(weights, shapes, tmp_path):
    path = tmp_path / "model.safetensors"
    sizes = st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n) + weights[8:])
    texts = json_texts(header_of(weights)).map(lambda text: with_header(weights, text))
    headered = headers(weights).map(lambda table: with_header(weights, table))

    @examples(60)
    @given(st.one_of(headered, texts, sizes, damaged_bytes(weights)))
    def fuzz(data):
        path.write_bytes(data)
        complaint(lambda: load(path, shapes), path)

    fuzz()


NAMES = st.sampled_from(
    ["part.safetensors", "../part.safetensors", "/etc/passwd", "", ".", "\0", "no", None, 3, [], {}]
)


def test_index(weights, shapes, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "part.safetensors").write_bytes(weights)
    index = folder / "model.safetensors.index.json"
    good = {"metadata": {}, "weight_map": dict.fromkeys(published_state(PI0), "part.safetensors")}
    mapped = st.dictionaries(st.sampled_from(["a", "b"]), NAMES).map(lambda some: {"weight_map": some})

    @examples(25)
    @given(st.one_of(json_texts(good), mapped.map(lambda table: json.dumps(table).encode())))
    def fuzz(data):
        index.write_bytes(data)
        complaint(lambda: load(folder, shapes), folder)

    fuzz()


def test_torch_files(shapes, tmp_path):
    path = tmp_path / "full_weights.pt"
    torch.save(published_state(PI0), path)
    others = st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02.", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04K\x01."])

    @examples(25)
    @given(st.one_of(damaged_bytes(path.read_bytes()), others))
    def fuzz(data):
        path.write_bytes(data)
        complaint(lambda: load(path, shapes), path)

    fuzz()


def test_convert_leaves_nothing_half_written(weights, tmp_path):
    path, output = tmp_path / "model.safetensors", tmp_path / "out"

    @examples(15)
    @given(st.one_of(headers(weights).map(lambda table: with_header(weights, table)), damaged_bytes(weights)))
    def fuzz(data):
        path.write_bytes(data)
        if complaint(lambda: convert(str(path), output), path) is None:
            (output / "model.safetensors").unlink()
        assert not output.exists() or not list(output.iterdir())

    fuzz()


TABLE = {"mean": [0.0, 1.0], "std": [1.0, 1.0], "q01": [-1.0, 0.0], "q99": [1.0, 2.0]}
STATS = {"norm_stats": {"state": TABLE, "actions": TABLE}, "made_of": {"fingerprint": "f", "rows": 4}}
LEROBOT = {
    column: {name: [0.0, 1.0] for name in ("mean", "std", "min", "max", "q01", "q99", "count")}
    for column in ("observation.state", "action")
}


def use(stats):
    """What is done with statistics wherever they come from."""
    from rlinf_core.data.normalize import Normalize

    for mode in ("mean_std", "quantile"):
        normalize = Normalize(stats, mode)
        for key in stats:
            normalize.normalized(key, torch.zeros(2).numpy())


@pytest.mark.parametrize(
    ("read", "document"),
    [(load_norm_stats, STATS), (read_openpi, STATS), (read_openpi, STATS["norm_stats"]), (read_lerobot, LEROBOT)],
    ids=["own", "openpi", "openpi, old", "lerobot"],
)
def test_statistics(read, document, tmp_path):
    path = tmp_path / "norm_stats.json"

    @examples(25)
    @given(json_texts(document))
    def fuzz(data):
        path.write_bytes(data)
        complaint(lambda: use(read(path)), path, "statistics")

    fuzz()


def test_statistics_in_safetensors(tmp_path):
    path = tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    whole = save({f"{column}.{name}": torch.zeros(2) for column in LEROBOT for name in ("mean", "std", "q01", "q99")})

    @examples(25)
    @given(st.one_of(headers(whole).map(lambda table: with_header(whole, table)), damaged_bytes(whole)))
    def fuzz(data):
        path.write_bytes(data)
        complaint(lambda: use(read_lerobot(path)), path, "statistics")

    fuzz()


def test_sentencepiece(tmp_path):
    whole = Path(SMALL_MODEL).read_bytes()
    path = tmp_path / "tokenizer.model"

    @examples(25)
    @given(damaged_bytes(whole))
    def fuzz(data):
        path.write_bytes(data)
        load_processor.cache_clear()
        complaint(lambda: PromptTokenizer(str(path), 48).encode("push the block"), path)

    fuzz()
    load_processor.cache_clear()
