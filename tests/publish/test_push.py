"""`rlinf push` with the hub's own client, against a hub on this machine that accepts uploads."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from fake_hub import point_to
from huggingface_hub import ModelCard, constants
from pushable_hub import TOKEN, Repo, serve
from safetensors.numpy import save_file

from rlinf_core import cli
from rlinf_core.publish.card import mark_of

CARD = "---\nlicense: mit\ntags: [robotics]\n---\n\n# arm\n\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_STATUS_CODES", (), raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as server:
        point_to(monkeypatch, server.address)
        yield server


@pytest.fixture
def exported(tmp_path):
    """A folder as `rlinf export` leaves it."""
    folder = tmp_path / "arm"
    folder.mkdir()
    write_weights(folder, 1.0)
    return folder


def write_weights(folder, value, card=CARD):
    save_file({"w": np.full(4, value, np.float32)}, folder / "model.safetensors")
    (folder / "norm_stats.json").write_text('{"norm_stats": {}}')
    names = ("model.safetensors", "norm_stats.json")
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "rlinf.json").write_text(json.dumps({"format": 1, "data": {"repo_id": "lab/pick"}, "sha256": digests}))
    (folder / "README.md").write_text(card + mark_of(card))


@pytest.fixture
def push(exported, capsys):
    def push(*options, repository="lab/arm", folder=exported):
        code = cli.main(["push", str(folder), repository, *options])
        said = "".join(capsys.readouterr())
        assert TOKEN not in said
        return code, said

    return push


def content(hub, branch="main", name="lab/arm"):
    return {key: value for key, value in hub.repos[name].branches[branch].items() if key != ".gitattributes"}


def written(hub):
    return [path for verb, path in hub.asked if verb not in ("GET", "HEAD")]


def test_without_yes_everything_is_shown_and_nothing_is_changed(hub, push):
    code, said = push()
    assert code == 0
    assert not hub.repos
    assert written(hub) == []
    assert all(name in said for name in ("model.safetensors", "norm_stats.json", "rlinf.json", "README.md"))
    assert "a new repository lab/arm; private" in said
    assert "nothing was uploaded: add --yes" in said


def test_a_new_repository_is_private_and_holds_the_folder_to_the_byte(hub, push, exported):
    code, said = push("--yes")
    assert code == 0, said
    assert hub.repos["lab/arm"].private
    assert content(hub) == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert sum("/commit/" in path for path in written(hub)) == 1  # Nobody downloads half a policy.
    assert push("--yes", repository="lab/open", folder=exported)[0] == 0
    assert push("--public", "--yes", repository="team/open")[0] == 0
    assert not hub.repos["team/open"].private


def test_a_second_push_sends_what_changed_and_a_third_nothing(hub, push, exported):
    push("--yes")
    write_weights(exported, 2.0)
    code, said = push()
    assert (code, "replaces the repository's" in said, "the same there already" in said) == (0, True, True)
    assert push("--yes")[0] == 0
    assert content(hub)["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    sent = hub.sent
    code, said = push("--yes")
    assert (code, hub.sent) == (0, sent)
    assert "has all of it already" in said


def test_after_a_failure_the_same_command_goes_on(hub, push, exported):
    hub.fail["/commit/"] = (403, "You have exceeded your storage")
    code, said = push("--yes")
    assert code == 2
    assert "may not write there" in said
    assert "You have exceeded your storage" in said
    assert hub.sent == 1
    hub.fail.clear()
    assert push("--yes")[0] == 0
    assert hub.sent == 1  # The hub has kept the large file.
    assert content(hub).keys() == {path.name for path in exported.iterdir()}


@pytest.mark.parametrize(
    ("part", "status", "said_of_it"),
    [
        ("whoami", 401, "does not know this account or token"),
        ("repos/create", 403, "needs write permission"),
        ("repos/create", 429, "wait a few minutes"),
        ("/commit/", 412, "somebody else changed it"),
        ("/lfs/", 413, "too large for the hub"),
        ("preupload", 500, "the hub answered 500"),
    ],
)
def test_refusals_of_the_hub_are_one_message_with_a_way_out(hub, push, part, status, said_of_it, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # The client tries again and again.
    hub.fail[part] = (status, "why it is so")
    code, said = push("--yes")
    assert code == 2
    assert said_of_it in said
    assert "why it is so" in said or part == "whoami"  # The client has words of its own for that.
    assert "Traceback" not in said


def test_without_a_network_or_a_token_that_is_said(hub, push, monkeypatch, tmp_path):
    point_to(monkeypatch, "http://127.0.0.1:9")
    code, said = push()
    assert (code, "not compared with the hub" in said, "cannot be reached" in said) == (0, True, True)
    code, said = push("--yes")
    assert (code, "cannot be reached" in said) == (2, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in push("--yes")[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    point_to(monkeypatch, hub.address)
    code, said = push("--yes")
    assert (code, "there is no token" in said, "hf auth login" in said) == (2, True, True)
    assert not hub.repos


def test_visibility_is_never_changed_and_never_a_surprise(hub, push):
    hub.repos["lab/arm"] = Repo(private=False)
    code, said = push("--yes")
    assert (code, "is public, so everybody would see this: add --public" in said) == (2, True)
    assert content(hub) == {}
    assert push("--public", "--yes")[0] == 0
    hub.repos["lab/arm"].private = True
    assert "is private, and a push does not change that" in push("--public", "--yes")[1]


def test_other_content_is_kept_unless_it_is_to_be_replaced(hub, push, exported):
    repo = hub.repos["lab/arm"] = Repo(private=True)
    repo.branches["main"] |= {"model-00001-of-00002.safetensors": b"x", ".gitattributes": b"y"}
    code, said = push("--yes")
    assert (code, "has other files, model-00001-of-00002.safetensors" in said) == (2, True)
    assert push("--yes", "--revision", "step-2")[0] == 2  # A branch begins with what is there.
    code, said = push("--replace")
    assert (code, "deleted" in said) == (0, True)
    assert "model-00001-of-00002.safetensors" in content(hub)
    assert push("--replace", "--yes")[0] == 0
    assert content(hub).keys() == {path.name for path in exported.iterdir()}
    assert repo.branches["main"][".gitattributes"] == b"y"


def test_a_branch_is_made_and_the_main_one_stays(hub, push, exported):
    push("--yes")
    before = content(hub)
    write_weights(exported, 3.0)
    assert push("--yes", "--revision", "ema")[0] == 0
    assert content(hub) == before
    assert content(hub, "ema")["model.safetensors"] == (exported / "model.safetensors").read_bytes()


def test_a_card_that_somebody_wrote_on_the_hub_is_not_overwritten(hub, push, exported):
    push("--yes")
    repo = hub.repos["lab/arm"]
    repo.branches["main"]["README.md"] += b"\nCite us.\n"
    write_weights(exported, 2.0, CARD.replace("# arm", "# arm, longer"))
    code, said = push("--yes")
    assert (code, "--keep-card" in said) == (2, True)
    assert push("--yes", "--keep-card")[0] == 0
    assert content(hub)["README.md"].endswith(b"Cite us.\n")
    assert content(hub)["model.safetensors"] == (exported / "model.safetensors").read_bytes()


def test_a_card_that_was_edited_here_is_uploaded_as_it_is(hub, push, exported):
    (exported / "README.md").write_text(CARD + "My own words.\n")
    code, said = push("--yes")
    assert (code, "was edited after the export" in said) == (0, True)
    assert ModelCard(content(hub)["README.md"].decode()).data.license == "mit"


def test_what_the_hub_does_not_accept_in_a_card_is_said(hub, push, exported):
    for text, said_of_it in (
        ("---\ndatasets: [null]\n---\n", "datasets must be ids on the hub"),
        ("---\nbase_model: /home/me/pi05\n---\n", "base_model must be ids on the hub"),
        ("---\nlicense: [\n---\n", "invalid metadata"),
        ("---\n- a\n---\n", "invalid metadata"),
        ("---\nlicense: nonsense\n---\n", '"license" must be one of'),  # By the hub itself.
    ):
        (exported / "README.md").write_text(text)
        code, said = push("--yes")
        assert (code, said_of_it in said) == (2, True), said
        assert not content(hub) if hub.repos else True
    (exported / "README.md").unlink()
    assert "there is no README.md" in push("--yes")[1]
    (exported / "README.md").write_text("---\nlicense: unknown\n---\n")
    assert "names no licence" in push()[1]


def test_all_that_is_wrong_with_a_folder_is_said_at_once(hub, push, exported):
    (exported / ".env").write_text("WANDB_API_KEY=abcdef0123456789abcdef")
    (exported / "wandb").mkdir()
    (exported / "wandb" / "run.log").write_text("x")
    (exported / "optimizer.bin").write_bytes(b"x")
    (exported / "link.md").symlink_to("/etc/hostname")
    (exported / ".DS_Store").write_bytes(b"x")
    (exported / "norm_stats.json").unlink()
    with open(exported / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    code, said = push("--yes")
    assert code == 2
    for part in (".env", "wandb/", "optimizer.bin", "link.md", "norm_stats.json missing", "model.safetensors changed"):
        assert part in said, part
    assert ".DS_Store" not in said
    assert not hub.repos


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", CARD + "Use it with hf_" + "Ab1" * 11 + "\n"),
        ("NOTES.md", "export WANDB_API_KEY=0123456789abcdef\n"),
        ("USE_POLICY.txt", "postgres://me:secret@db/robots\n"),
    ],
)
def test_secrets_are_found_and_not_repeated(hub, push, exported, name, text):
    (exported / name).write_text(text)
    code, said = push("--yes")
    assert (code, f"{name} has a secret, line" in said) == (2, True)
    assert not any(secret in said for secret in ("Ab1Ab1", "0123456789abcdef", "secret@db"))
    assert not hub.repos


def test_a_vocabulary_is_no_secret_and_a_key_named_after_one_is(hub, push, exported):
    table = json.loads((exported / "rlinf.json").read_text())
    for name, content in (("tokenizer.json", {"vocab": {"password": 7, "api_key": 8}, "eos_token": "<|im_end|>"}),):
        (exported / name).write_text(json.dumps(content, indent=1))
        table["sha256"][name] = hashlib.sha256((exported / name).read_bytes()).hexdigest()
    (exported / "rlinf.json").write_text(json.dumps(table))
    code, said = push()
    assert code == 0, said
    (exported / "rlinf.json").write_text(json.dumps(table | {"logger": {"wandb_api_key": "0123456789abcdef0123"}}))
    code, said = push()
    assert (code, "rlinf.json has a secret, the key 'wandb_api_key'" in said) == (2, True)
    assert "0123456789abcdef0123" not in said


def test_what_would_be_public_of_this_machine_is_said(hub, push, exported):
    table = json.loads((exported / "rlinf.json").read_text())
    table["data"]["repo_id"] = "/home/alice/data/pick"
    (exported / "rlinf.json").write_text(json.dumps(table))
    code, said = push()
    assert (code, "rlinf.json names paths of this machine: /home/alice/data/pick" in said) == (0, True)


def test_only_exports_are_pushed(hub, push, exported, tmp_path):
    run, checkpoint, other = (tmp_path / name for name in ("run", "checkpoint", "other"))
    for folder, name in ((run, "config.toml"), (checkpoint, "state.json"), (other, "model.safetensors")):
        folder.mkdir()
        (folder / name).write_text("{}")
    assert "is a run, with optimizer states" in push(folder=run)[1]
    assert "is a checkpoint, with optimizer states" in push(folder=checkpoint)[1]
    assert "not a folder that `rlinf export` wrote" in push(folder=other)[1]
    assert push(folder=tmp_path / "none")[0] == 2
    for broken in ("", "[]", '{"sha256": {"../x": "a"}}', '{"sha256": {}}'):
        (exported / "rlinf.json").write_text(broken)
        assert push()[0] == 2


def test_names_are_checked_before_anything_is_sent(hub, push):
    for name in ("arm", "lab/arm/x", "lab/a rm", "https://huggingface.co/lab/arm"):
        code, said = push("--yes", repository=name)
        assert (code, "is not a repository, owner/name" in said) == (2, True), said
    assert push("--yes", repository="others/arm")[0] == 2
    assert not hub.repos


def test_the_command_leaves_torch_unloaded():
    modules = "rlinf_core.commands.push, rlinf_core.publish.folder, rlinf_core.publish.repository"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
