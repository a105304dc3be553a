"""Tables: what an override says, how layers merge, how places are written, what differs."""

import pytest

from rlinf_core import UserError
from rlinf_core.config.toml import diff_tables, dotted, merge, parse_override, read_toml, typed_values, write_toml


@pytest.mark.parametrize(
    ("override", "table"),
    [
        ("runner.name=smoke", {"runner": {"name": "smoke"}}),
        ("optim.lr=1e-4", {"optim": {"lr": 1e-4}}),
        ("runner.max_steps=1_000", {"runner": {"max_steps": 1000}}),
        ("trainer.reshard_after_forward=false", {"trainer": {"reshard_after_forward": False}}),
        ('runner.loggers=["x", "y"]', {"runner": {"loggers": ["x", "y"]}}),
        ("data.images.base_0_rgb=observation.image", {"data": {"images": {"base_0_rgb": "observation.image"}}}),
        ("data.repo_id=../some/where-1.0/x", {"data": {"repo_id": "../some/where-1.0/x"}}),
        ("data.repo_id=/a=b", {"data": {"repo_id": "/a=b"}}),
        ("runner.name=2026-01-31", {"runner": {"name": "2026-01-31"}}),
        ("runner.name=007", {"runner": {"name": "007"}}),
        ("runner.name='42'", {"runner": {"name": "42"}}),
        ("data.revision=", {"data": {"revision": ""}}),
        ("data.default_prompt=1\nseed = 2", {"data": {"default_prompt": "1\nseed = 2"}}),
        ("data.cameras={a = 'b'}", {"data": {"cameras": {"a": "b"}}}),
        ('data.cameras."my.cam"=x', {"data": {"cameras": {"my.cam": "x"}}}),
        (" seed = 3 ", {"seed": 3}),
    ],
)
def test_overrides_are_toml_or_bare_text(override, table):
    assert parse_override(override) == table


def test_unfinished_values_name_the_shell():
    with pytest.raises(UserError, match=r"'a=\[x\]': the value is not TOML .*does the shell need quotes"):
        parse_override("a=[x]")


def test_tables_merge_and_everything_else_replaces():
    low = {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}
    high = {"a": {"y": [3]}, "b": {"w": 2}, "c": 5}
    assert merge(low, high) == {"a": {"x": 1, "y": [3]}, "b": {"w": 2}, "c": 5}
    assert low == {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}


def test_places_are_written_as_in_toml():
    assert dotted(("data", "images", "my.cam")) == 'data.images."my.cam"'
    assert dotted(("optim", "betas", 1)) == "optim.betas[1]"
    assert dotted(("a", "")) == 'a.""'


def test_differences_cover_new_lost_and_empty_tables():
    old, new = {"a": {"x": 1}, "b": {}}, {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    assert diff_tables(old, new) == [("b", {}, None), ("a.y", None, 2), ("b.z", None, 3)]
    assert diff_tables(old, old) == []


def test_text_is_read_like_a_file(tmp_path):
    table = {"a": {"x": [1.5, "ü"]}}
    (tmp_path / "a.toml").write_text(write_toml(table), encoding="utf-8")
    assert read_toml(tmp_path / "a.toml") == read_toml(write_toml(table)) == table


def test_toml_cannot_say_none():
    with pytest.raises(TypeError):
        write_toml({"a": [None]})


def test_values_are_known_as_they_are_typed(tmp_path):
    text = "seed = 1_0  # ten\n[runner]\nname = 2026_07_01\n[[data.mixture]]\nweight = 1e5\n[a.b]\nc.d = 1e5\n"
    (tmp_path / "run.toml").write_text(text)
    found = {("seed",): "1_0", ("runner", "name"): "2026_07_01", ("a", "b", "c", "d"): "1e5"}
    assert typed_values(tmp_path / "run.toml") == found
