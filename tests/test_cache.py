"""The cache: whatever happens to its files, what is read is what was written."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from damaging import damaged_bytes, examples
from hypothesis import given

from rlinf_core import cache
from rlinf_core.cache import cache_folder, cache_key, find_entry, read_entry, remove_abandoned, replacing, store_entry
from rlinf_core.errors import UserError

KEY = cache_key("rows", 3)
CONTENT = {"big.bin": os.urandom(3 * 2**20 + 7), "empty.bin": b"", "text.txt": b"two\nlines\n"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "BLOCK", 2**16)
    monkeypatch.setattr(cache, "PART", 2**20)
    monkeypatch.setattr(cache, "_checked", set())
    return tmp_path / "cache" / "things"


def write(folder):
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return {"names": list(CONTENT)}


def is_whole(entry):
    return {name: entry.file(name).read_bytes() for name in entry.stored} == CONTENT


def test_an_entry_is_found_again_and_shares_equal_files(folder):
    assert find_entry("things", KEY) is None
    first = store_entry("things", KEY, write)
    assert is_whole(first)
    assert find_entry("things", KEY) == first
    other = store_entry("things", cache_key("rows", 4), write)
    assert other.file("big.bin") == first.file("big.bin")
    assert len(list(folder.iterdir())) == 2 + len(CONTENT)
    assert find_entry("things", cache_key("rows", 5)) is None


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "zeroed": zero,
    "flipped": flip,
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "of another program": lambda path: path.write_text('{"files": {}, "facts": {}}'),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("what", ["a file", "the manifest"])
def test_damage_is_named_and_written_again(how, what, folder, capsys, monkeypatch):
    entry = store_entry("things", KEY, write)
    path = entry.file("big.bin") if what == "a file" else entry.manifest
    DAMAGE[how](path)
    assert find_entry("things", KEY) is None
    said = capsys.readouterr().err
    gone = (what, how) == ("the manifest", "removed")  # Then there is no entry, as before the first start.
    assert gone or (str(path) in said and "the cache is damaged" in said)
    if how == "a folder":
        shutil.rmtree(path)  # Nothing of a user's is removed for a cache.
    assert is_whole(store_entry("things", KEY, write))
    assert is_whole(find_entry("things", KEY))
    assert capsys.readouterr().err == ""


def test_checksums_are_compared_once_in_the_first_process_of_a_machine(capsys, monkeypatch):
    entry = store_entry("things", KEY, write)
    assert find_entry("things", KEY)
    with monkeypatch.context() as once:
        once.setattr(cache, "_checksums_of_part", None)
        assert find_entry("things", KEY)
    flip(entry.file("big.bin"))
    os.utime(entry.file("big.bin"), ns=(1, 1))
    with monkeypatch.context() as other:
        other.setenv("LOCAL_RANK", "1")
        assert find_entry("things", KEY)
    assert find_entry("things", KEY) is None
    assert str(entry.file("big.bin")) in capsys.readouterr().err


def test_two_processes_that_write_at_once_both_succeed(folder, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # As in two containers.

    def write_while_another_does(aside):
        write(aside)
        store_entry("things", KEY, write)
        return {"names": list(CONTENT)}

    entry = store_entry("things", KEY, write_while_another_does)
    assert is_whole(entry)
    assert find_entry("things", KEY) == entry
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


def test_who_has_opened_a_file_keeps_it(folder):
    entry = store_entry("things", KEY, write)
    mapped = np.memmap(entry.file("big.bin"), np.uint8, "r")
    store_entry("things", KEY, write)
    shutil.rmtree(folder)
    assert mapped.tobytes() == CONTENT["big.bin"]
    assert entry.damage


def test_a_failed_write_leaves_nothing_behind(folder):
    def fails(aside):
        write(aside)
        raise OSError(122, "Disk quota exceeded")

    with pytest.raises(OSError, match="quota"):
        store_entry("things", KEY, fails)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [5, 28, 122])  # Damaged disk, full disk, quota: NFS says so when a file is synced.
def test_what_cannot_be_synced_is_not_left_behind(number, folder, monkeypatch):
    def fails(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=os.strerror(number)):
        store_entry("things", KEY, write)
    with pytest.raises(OSError, match=os.strerror(number)), replacing(folder / "one") as aside:
        aside.write_bytes(b"x")
    assert not list(folder.iterdir())


def test_a_cache_that_may_only_be_read_is_used(folder, monkeypatch):
    entry = store_entry("things", KEY, write)
    monkeypatch.setattr(cache, "store_entry", None)
    monkeypatch.setattr(Path, "mkdir", None)
    monkeypatch.setattr(Path, "touch", None)
    assert find_entry("things", KEY) == entry


def test_any_damage_to_a_manifest_or_a_file_is_found(monkeypatch):
    entry = store_entry("things", KEY, write)
    monkeypatch.setattr(cache, "warn", lambda text: None)
    contents = {path: path.read_bytes() for path in (entry.manifest, entry.file("text.txt"))}

    def fuzz(path):
        @examples(40)
        @given(damaged_bytes(contents[path]))
        def damage(data):
            path.write_bytes(data)
            cache._checked.clear()
            assert (find_entry("things", KEY) == entry) == (data == contents[path])

        damage()
        path.write_bytes(contents[path])

    for path in contents:
        fuzz(path)


def test_other_users_may_read_what_the_umask_allows(folder):
    before = os.umask(0o022)
    try:
        entry = store_entry("things", KEY, write)
    finally:
        os.umask(before)
    paths = [entry.manifest, *map(entry.file, entry.stored)]
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("skew", [0, 10**8])
def test_what_killed_processes_left_is_removed_by_the_clock_of_the_files(skew, folder, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: skew)
    folder.mkdir(parents=True)
    names = {"old": 8 * 24 * 3600, "new": 60}
    for name, age in names.items():
        for path in (cache.temporary(folder / name), cache.temporary(folder / f"{name}-folder")):
            if path.name.startswith(f".{name}-folder"):
                path.mkdir()
            else:
                path.touch()
            now = path.stat().st_mtime
            os.utime(path, (now - age, now - age))
    own = folder / ".my-notes.tmp"
    own.touch()
    os.utime(own, (0, 0))
    remove_abandoned(folder)
    left = [path.name.split(".")[1] for path in folder.iterdir()]
    assert sorted(left) == ["my-notes", "new", "new-folder"]


def test_a_damaged_manifest_is_no_path_elsewhere(folder):
    entry = store_entry("things", KEY, write)
    table = entry.manifest.read_text().replace(entry.stored["big.bin"].stored, "../../x.bin")
    entry.manifest.write_text(table)
    with pytest.raises(UserError, match="has changed"):
        read_entry(entry.manifest)


def test_the_folder_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RLINF_CACHE", "~/here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("RLINF_CACHE", "")  # As an unset variable of a shell or of Docker's `-e`.
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "rlinf_core"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rlinf_core"
    monkeypatch.setenv("RLINF_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(UserError, match="set RLINF_CACHE"):
        cache_folder()
