"""Repositories of a hub that answers, refuses, or is not there."""

import time

import pytest
from fake_hub import COMMIT, point_to, serve
from huggingface_hub import constants

from rlinf_core import hub
from rlinf_core.errors import UserError


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A hub with the model or dataset `lab/arm`, and an empty cache in front of it."""
    root = tmp_path / "remote"
    for name in ("meta/info.json", "meta/tasks.jsonl", "data/a.parquet", "data/b.parquet", "tokenizer.model"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._open_snapshot.cache_clear()
    with serve(root) as server:
        point_to(monkeypatch, server.address)
        yield server
    hub._open_snapshot.cache_clear()


def open_arm(revision=None):
    return hub.open_snapshot("lab/arm", revision, "dataset", "data.repo_id", "meta/info.json")


def go_away(monkeypatch):
    """From now on nobody answers; what the process knows is forgotten."""
    point_to(monkeypatch, "http://127.0.0.1:9")
    hub._open_snapshot.cache_clear()


def test_only_what_is_asked_for_is_downloaded_once_and_of_one_commit(remote):
    snapshot = open_arm()
    assert snapshot.commit == COMMIT
    assert snapshot.names("meta") == ["meta/info.json", "meta/tasks.jsonl"]
    snapshot.fetch(["data/b.parquet", "meta/info.json", "data/none.parquet"])
    assert (snapshot.folder / "data/b.parquet").read_text() == "data/b.parquet"
    assert not (snapshot.folder / "data/none.parquet").exists()
    assert remote.got() == ["data/b.parquet", "meta/info.json"]
    assert {path for verb, path in remote.asked if verb == "HEAD"} == {*remote.got(), "data/none.parquet"}
    before = len(remote.asked)
    snapshot.fetch(["data/b.parquet", "meta/info.json"])
    assert open_arm() is snapshot
    assert len(remote.asked) == before


def test_without_a_network_the_cache_serves_and_what_it_lacks_is_told_at_once(remote, monkeypatch):
    open_arm().fetch(["meta/info.json"])
    hub.download_file("lab/arm", "tokenizer.model", None, "policy.tokenizer")
    go_away(monkeypatch)
    start = time.monotonic()
    assert hub.download_file("lab/arm", "tokenizer.model", None, "policy.tokenizer").read_text() == "tokenizer.model"
    cached = open_arm()
    assert cached.names("meta") == ["meta/info.json"]
    cached.fetch(["meta/info.json"])
    with pytest.raises(UserError, match=r"data/a\.parquet and 1 more files of the dataset lab/arm .*is unreachable"):
        cached.fetch(["data/a.parquet", "data/b.parquet"])
    with pytest.raises(UserError, match=r"policy\.weights: .*w\.safetensors of the model lab/arm@v2"):
        hub.download_file("lab/arm", "w.safetensors", "v2", "policy.weights")
    with pytest.raises(UserError, match="is unreachable"):
        open_arm("v2")
    assert time.monotonic() - start < 5  # The client alone takes 23 s.


def test_offline_mode_asks_nobody(remote, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.repo_id: 'lab/arm' .*HF_HUB_OFFLINE is set.*hf auth login") as error:
        open_arm("v2")
    assert "hf download lab/arm --repo-type dataset --revision v2 --local-dir FOLDER" in str(error.value)
    assert str(constants.HF_HUB_CACHE) in str(error.value)
    assert remote.asked == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "the hub has no such repository, or this account has no access to it"),
        (404, "the hub has no such repository, or this account has no access to it"),
        (403, "it is gated, and this account has no access"),
    ],
)
def test_a_refusal_says_why_and_no_token(remote, monkeypatch, status, reason):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    remote.status = status
    for ask in (open_arm, lambda: hub.download_file("lab/arm", "tokenizer.model", None, "data.repo_id")):
        with pytest.raises(UserError, match=reason) as error:
            ask()
        assert "HF_TOKEN" in str(error.value)
        assert "hf_secret" not in str(error.value)


def test_a_revision_or_a_file_that_is_not_there(remote):
    with pytest.raises(UserError, match=r"lab/arm@v9 .*the repository has no such revision"):
        open_arm("v9")
    with pytest.raises(hub.NotInRepositoryError):
        hub.open_snapshot("lab/arm", None, "dataset", "data.repo_id", "meta/nothing.json")
    with pytest.raises(hub.NotInRepositoryError):
        hub.download_file("lab/arm", "nothing.json", None, "policy.weights")
