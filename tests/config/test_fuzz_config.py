"""TOML files and overrides as anybody may write them: a config, or one message that names the file."""

import tomllib

import pytest
from damaging import ODD, complaint, damaged, damaged_bytes, examples
from distributions import ROOT, repository_plugins
from hypothesis import given
from hypothesis import strategies as st

from rlinf_core.config.load import dump_config, load_config
from rlinf_core.config.toml import parse_override, read_toml, write_toml

QUICK = ROOT / "examples" / "quickstart.toml"


def mixed(table):
    """The config with its dataset as one of two."""
    data = {key: table["data"][key] for key in ("config_name", "repo_id")}
    return table | {"data": {"mixture": [data | {"weight": 2.0}, data | {"name": "again", "state": ["s"]}]}}


TABLES = {
    "quickstart": read_toml(QUICK),
    "mixture": mixed(read_toml(QUICK)),
    "text": read_toml(ROOT / "examples" / "text_sft.toml"),
}


@pytest.fixture(scope="module")
def plugins():
    return repository_plugins()


def says(odd):
    """Whether TOML can say a value."""
    try:
        tomllib.loads(write_toml({"x": odd}).encode().decode())
    except (TypeError, ValueError):
        return False
    return True


SAID = tuple(odd for odd in ODD if says(odd))


def load(path, overrides, plugins):
    run = load_config(path, overrides, plugins)
    path.write_text(dump_config(run))
    assert load_config(path, (), plugins) == run


@pytest.mark.parametrize("name", TABLES)
def test_values_and_keys(name, plugins, tmp_path):
    path = tmp_path / "run.toml"

    @examples(20)
    @given(damaged(TABLES[name], SAID))
    def fuzz(table):
        path.write_text(write_toml(table), encoding="utf-8")
        complaint(lambda: load(path, (), plugins), path)

    fuzz()


def test_bytes(plugins, tmp_path):
    path = tmp_path / "run.toml"
    whole = QUICK.read_bytes()
    others = st.sampled_from([b"", b"a = " + b"[" * 50_000, b"\xff", b"a." * 5000 + b"b = 1", b"a = 1e999", b"\0"])

    @examples(25)
    @given(st.one_of(damaged_bytes(whole), damaged_bytes(whole), others))
    def fuzz(data):
        path.write_bytes(data)
        complaint(lambda: load_config(path, (), plugins), path)

    fuzz()


KEYS = ("optim.lr", "data.images", "data.mixture", "data.mixture.0.weight", "policy", "policy.type", "runner.loggers")
KEYS += ("cluster.component_placement", "cluster", "trainer.type", "plugins", "plugins.x.y", "seed", "", ".")
VALUES = ("[", "{a=1}", '"', "[1, 'a']", "nan", "-inf", "1e400", "0x", "2020-01-01", "{" * 3000, "\0", "[[]]", "true")


def test_overrides(plugins, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(QUICK.read_bytes())
    made = st.tuples(st.sampled_from(KEYS), st.one_of(st.sampled_from(VALUES), st.text(max_size=8))).map("=".join)

    @examples(25)
    @given(st.lists(st.one_of(made, st.text(max_size=12)), min_size=1, max_size=3))
    def fuzz(overrides):
        complaint(lambda: load_config(path, overrides, plugins), path)

    fuzz()


def test_an_override_is_a_table_or_a_mistake():
    @examples(100)
    @given(st.text(max_size=30))
    def fuzz(text):
        complaint(lambda: parse_override(text), "override", "TOML")

    fuzz()
