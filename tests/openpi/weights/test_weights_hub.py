"""What `policy.weights` names: paths, and ids of the hub, whose answers are played here."""

import json

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from tiny_pi0 import PI0, published_state, shapes_of

from rlinf_core.errors import UserError
from rlinf_plugins_openpi.config import Pi0Config
from rlinf_plugins_openpi.weights.hub import find_cached_weights, find_weights
from rlinf_plugins_openpi.weights.source import PublishedWeights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's local cache, empty, of a machine without a network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def cached(cache, name="lerobot--pi05_base", branch="main"):
    """A model in the cache: the folder of its files."""
    model = cache / f"models--{name}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / branch).write_text(COMMIT)
    files = model / "snapshots" / COMMIT
    files.mkdir(parents=True)
    return files


def save_shards(folder):
    state = published_state(PI0)
    keys = sorted(state)
    for number, part in enumerate((keys[::2], keys[1::2])):
        save_file({key: state[key] for key in part}, folder / f"part-{number}.safetensors")
    files = {key: f"part-{number}.safetensors" for number in (0, 1) for key in keys[number::2]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_a_model_in_the_cache_needs_no_network(cache):
    files = cached(cache)
    save_file(published_state(PI0), files / "model.safetensors")
    for text in ("lerobot/pi05_base", f"lerobot/pi05_base@{COMMIT}", "lerobot/pi05_base@main"):
        assert find_weights(text) == find_cached_weights(text) == files


def test_shards_are_of_the_commit_of_their_index(cache):
    files = cached(cache)
    save_shards(files)
    for find in (find_weights, find_cached_weights):
        PublishedWeights(find("lerobot/pi05_base"), PI0).check(shapes_of(PI0))
    (files / "part-1.safetensors").unlink()
    assert find_cached_weights("lerobot/pi05_base") is None
    with pytest.raises(
        UserError, match=r"part-1\.safetensors of the model lerobot/pi05_base.* cannot be loaded from the hub"
    ):
        find_weights("lerobot/pi05_base")


def test_only_the_weights_are_downloaded_and_shards_of_one_commit(tmp_path, monkeypatch):
    folder, asked = tmp_path / COMMIT, []
    folder.mkdir()
    save_shards(folder)

    def download(repository, file, revision=None, **options):
        asked.append((repository, file, revision))
        if not (folder / file).exists():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_weights("some/model@v2") == folder
    files = ["model.safetensors", "model.safetensors.index.json", "part-0.safetensors", "part-1.safetensors"]
    revisions = ["v2", "v2", COMMIT, COMMIT]
    assert asked == [("some/model", file, revision) for file, revision in zip(files, revisions, strict=True)]
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(
        UserError, match=r"some/model@v2 on the hub holds neither model\.safetensors nor model\.s.*json"
    ):
        find_weights("some/model@v2")


def test_absent_says_id_revision_cache_and_ways_out(cache):
    with pytest.raises(UserError) as error:
        find_weights("lerobot/pi05_base@v9")
    message = str(error.value)
    assert isinstance(error.value.__cause__, LocalEntryNotFoundError)
    for part in ("'lerobot/pi05_base'", "lerobot/pi05_base@v9", str(cache), "HF_HUB_OFFLINE", "hf auth login"):
        assert part in message
    assert "hf download lerobot/pi05_base --revision v9 --local-dir FOLDER" in message


LIKE_PATHS = ("weights/pi05", "runs/pi05", "pi05_ft/30000", "pi05_ft/pretrained_model", "pi05_ft/model.safetensors")


def test_a_name_like_a_path_needs_a_revision_to_be_on_the_hub(cache):
    assert find_cached_weights("weights/pi05@main") is None
    for text in LIKE_PATHS:
        with pytest.raises(UserError, match=rf"is a path's rather than a hub id's; .* write {text}@main"):
            find_cached_weights(text)


@pytest.mark.parametrize("text", ["./lerobot/pi05", "~/lerobot/pi05", "pi05_base", "a/b/c", "checkpoints/pi05_bse"])
def test_a_path_with_a_slip_is_no_hub_id(cache, tmp_path, text):
    (tmp_path / "checkpoints" / "pi05_base").mkdir(parents=True)
    for find in (find_weights, find_cached_weights):
        with pytest.raises(UserError, match="there is no file or folder"):
            find(text)


def test_beside_a_folder_of_the_owners_name_a_revision_tells_the_hubs(cache, tmp_path):
    (tmp_path / "lerobot").mkdir()
    with pytest.raises(UserError, match=r"but there is a folder lerobot; .* add its revision: lerobot/pi05_base@main"):
        find_weights("lerobot/pi05_base")
    with pytest.raises(UserError, match="cannot be loaded from the hub"):
        find_weights("lerobot/pi05_base@main")


def test_a_path_wins_over_a_hub_id(cache, tmp_path):
    cached(cache)
    (tmp_path / "lerobot" / "pi05_base").mkdir(parents=True)
    assert find_weights("lerobot/pi05_base").resolve() == tmp_path / "lerobot" / "pi05_base"


def test_validating_downloads_nothing(cache, monkeypatch):
    config = Pi0Config(variant="dummy", weights="lerobot/pi0_base")
    with pytest.raises(UserError, match="is not in the cache and cannot be downloaded: HF_HUB_OFFLINE is set"):
        config.check_files()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("it downloads"))
    config.check_files()
    save_file(published_state(PI0), cached(cache, "lerobot--pi0_base") / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit the model: [1-9]\d* missing"):
        config.check_files()


def test_validating_opens_no_pickle(tmp_path):
    (tmp_path / "full_weights.pt").write_text("not looked at")
    Pi0Config(variant="dummy", weights=str(tmp_path)).check_files()
