"""Completion of `key=value`: keys of the classes that the config chooses, names, files, and what is kept for later."""

import json
import os

import pytest
from distributions import ROOT, repository_plugins

from rlinf_core.commands import overrides
from rlinf_core.commands.overrides import complete_override, complete_path

QUICKSTART = str(ROOT / "examples" / "quickstart.toml")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)
    return tmp_path / "cache" / "completion"


def offered(prefix, *earlier, config=QUICKSTART):
    return list(complete_override(prefix, config, earlier))


def test_keys_are_those_of_the_chosen_classes():
    assert offered("optim.warm") == ["optim.warmup_steps="]
    assert offered("data.raw_ac") == ["data.raw_action_is_delta="]  # Of openpi's formats.
    assert offered("policy.max_t") == ["policy.max_token_len="]
    assert offered("policy.overl") == []
    assert offered("policy.overl", config=str(ROOT / "examples" / "text_sft.toml")) == ["policy.overlong="]
    assert offered("see") == ["seed="]
    assert offered("policy.vari", "policy.nothing_like_it=3") == ["policy.variant="]  # Mistakes are for validate.
    assert "" not in complete_override("optim.", QUICKSTART, ()).values()


def test_values_are_names_or_files(monkeypatch):
    assert offered("policy.variant=d") == ["policy.variant=dummy"]
    assert offered("trainer.compile=") == ["trainer.compile=true", "trainer.compile=false"]
    assert offered("optim.type=") == ["optim.type=adamw", "optim.type=muon"]
    assert "optim.schedule=hf_cosine" in offered("optim.schedule=")
    assert "data.config_name=pi05_custom" in offered("data.config_name=pi05_c")
    assert offered("optim.lr=") == []
    assert offered("nowhere.at_all=") == []
    monkeypatch.chdir(ROOT)
    assert offered("data.repo_id=examples/dat") == ["data.repo_id=examples/data/"]


def test_a_mixture_is_completed_by_its_entries(tmp_path):
    entry = '[[data.mixture]]\nconfig_name = "pi05_custom"\n'
    (tmp_path / "run.toml").write_text(entry + entry, encoding="utf-8")
    found = offered("data.mixture.1.wei", config=str(tmp_path / "run.toml"))
    assert found == ["data.mixture.1.weight="]


def test_what_cannot_be_read_offers_nothing(tmp_path):
    (tmp_path / "run.toml").write_text("[data", encoding="utf-8")
    assert offered("optim.", config=str(tmp_path / "run.toml")) == []
    assert offered("optim.", config=str(tmp_path / "missing.toml")) == []


def test_keys_are_kept_until_the_config_the_packages_or_a_source_file_change(monkeypatch, tmp_path, cache):
    config = tmp_path / "run.toml"
    config.write_text('[data]\nconfig_name = "pi05_custom"', encoding="utf-8")
    calls, find = [], overrides._find_keys
    monkeypatch.setattr(overrides, "_find_keys", lambda *given: calls.append(given) or find(*given))
    for _ in range(2):
        assert offered("policy.max_t", config=str(config)) == ["policy.max_token_len="]
    assert len(calls) == 1
    (kept,) = cache.iterdir()
    known = json.loads(kept.read_text(encoding="utf-8"))
    assert str(ROOT / "rlinf_core/src/rlinf_core/contract/tables/runner.py") in known["sources"]
    known["sources"][next(iter(known["sources"]))] += 1
    for damaged in (json.dumps(known), "{", "[]", '{"version": 1, "sources": {}, "keys": {"a": 3}}'):
        kept.write_text(damaged, encoding="utf-8")
        assert offered("policy.max_t", config=str(config)) == ["policy.max_token_len="]
    assert len(calls) == 5
    config.write_text('[data]\nconfig_name = "pi0_custom"', encoding="utf-8")
    assert offered("policy.max_t", config=str(config)) == ["policy.max_token_len="]
    monkeypatch.syspath_prepend(tmp_path)
    offered("policy.", config=str(config))
    os.utime(tmp_path, ns=(1, 1))  # As installing a package into it does.
    offered("policy.", config=str(config))
    assert len(calls) == 8


def test_without_a_place_for_the_cache_completion_works(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "file"))
    assert offered("optim.warm") == ["optim.warmup_steps="]


def test_paths_are_files_of_an_ending_and_folders(tmp_path):
    for name in ("a.toml", "a.txt", ".a.toml"):
        (tmp_path / name).touch()
    (tmp_path / "a").mkdir()
    assert sorted(complete_path(f"{tmp_path}/a", ".toml")) == [f"{tmp_path}/a.toml", f"{tmp_path}/a/"]
    assert list(complete_path(f"{tmp_path}/.a")) == [f"{tmp_path}/.a.toml"]
    assert list(complete_path(f"{tmp_path}/missing/a")) == []
