"""Check a folder before it becomes public: an export of `rlinf export`, whole, with nothing else in it.

Everything that is wrong is reported at once. Nothing is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rlinf_core.contract.weights.origin import DESCRIPTION
from rlinf_core.errors import UserError
from rlinf_core.publish.card import is_edited
from rlinf_core.publish.description import DIGESTS, DIGESTS_KEY, sha256_of
from rlinf_core.publish.origins import README, UNKNOWN
from rlinf_core.publish.privacy import paths_in, secrets_in
from rlinf_core.results import IMAGES, VIDEOS
from rlinf_core.untrusted.text import path_inside, read_json, read_text

TEXTS = (".json", ".md", ".txt", ".toml", ".yaml", ".yml", ".jinja", ".py", ".cfg", ".ini", "")
"""Endings of the files in which secrets are looked for."""
LARGEST_TEXT = 8 * 2**20
"""Larger files are vocabularies: they are not searched."""
LEFT_OUT = (".cache", ".DS_Store", "Thumbs.db")
"""What the hub's client and desktops leave behind; it is not uploaded."""
OWN = (DESCRIPTION, DIGESTS, README)
ADDED = re.compile(r"(LICEN[CS]E|NOTICE|CITATION|USE_POLICY)(\.\w+)?|\.gitattributes|[^/]+\.md", re.IGNORECASE)
"""Names of files that people add to an exported folder."""
LISTED = 8
"""Names in a message."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checked:
    """A folder and what is wrong with it."""

    folder: Path
    files: Mapping[str, int]
    """Name -> bytes of what is to be uploaded, in order."""
    digests: Mapping[str, str]
    """Name -> SHA-256 of each of these files."""
    problems: Sequence[str]
    """Why it must not be uploaded, one sentence each with its way out."""
    notes: Sequence[str]
    """What its owner should know, one sentence each."""
    card: Mapping[str, Any]
    """The metadata of the model card; empty if they cannot be read."""


def check_folder(folder: Path, progress: Callable[[int, int], object] = lambda done, all: None) -> Checked:
    """Check a folder that is to be uploaded.

    Args:
        folder: The folder.
        progress: Called with the bytes that were read, and all.

    Raises:
        UserError: It is not a folder that `rlinf export` wrote.
    """
    recorded = _recorded(folder)
    problems: list[str] = []
    notes: list[str] = []
    files = {name: path for name, path in _files(folder) if PurePosixPath(name).parts[0] not in LEFT_OUT}
    problems += _foreign(folder, [name for name in files if name not in recorded and name not in OWN])
    if missing := [name for name in recorded if name not in files]:
        problems.append(f"{_listed(missing)} missing: the folder is incomplete; export it again")
    own = {name: path for name, path in files.items() if name in recorded or _may_be_added(name, path)}
    digests = _digests(own, progress)
    if changed := [name for name, digest in recorded.items() if name in digests and digests[name] != digest]:
        problems.append(f"{_listed(changed)} changed since the export (SHA-256): it is damaged, export it again")
    for name, path in own.items():
        found = _search(path)
        problems += [
            f"{name} has a secret, {where}: remove it, and revoke it if it was ever public" for where in found[0]
        ]
        if found[1]:
            notes.append(f"{name} names paths of this machine: {_listed(found[1])}")
    card = _check_card(folder, problems, notes)
    sizes = {name: path.stat().st_size for name, path in own.items()}
    return Checked(folder, sizes, digests, list(dict.fromkeys(problems)), notes, card)


def _recorded(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that the export wrote. Raises `UserError` if it is not an export."""
    if not folder.is_dir():
        raise UserError(f"{folder} is {'a file' if folder.exists() else 'not there'}: name a folder of `rlinf export`")
    way_out = "export it first: `rlinf export RUN --output FOLDER`, and push that folder"
    if (folder / "config.toml").is_file() and not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} is a run, with optimizer states and local paths: {way_out}")
    if (folder / "state.json").is_file() or any(folder.glob("*.distcp")) or (folder / "optimizer.pt").exists():
        raise UserError(f"{folder} is a checkpoint, with optimizer states: {way_out}")
    path = folder / (DESCRIPTION if (folder / DESCRIPTION).is_file() else DIGESTS)
    if not path.is_file():
        raise UserError(
            f"{folder} is not a folder that `rlinf export` wrote (it has neither {DESCRIPTION} nor {DIGESTS}), or an "
            f"older version wrote it: {way_out}"
        )
    try:
        found = read_json(path)[DIGESTS_KEY] if path.name == DESCRIPTION else _parse_digests(read_text(path))
        names = {str(name): str(digest) for name, digest in dict(found).items()}
        for name in names:
            path_inside(folder, name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): export it again") from error
    if not any(name.endswith((".safetensors", ".pt", ".bin")) for name in names):
        raise UserError(f"{path} lists no weights: export it again")
    return names


def _parse_digests(text: str) -> dict[str, str]:
    lines = [line.partition("  ") for line in text.splitlines() if line.strip()]
    if any(not re.fullmatch(r"[0-9a-f]{64}", digest) or not name for digest, _, name in lines):
        raise ValueError("a line is not a digest and a name")
    return {name: digest for digest, _, name in lines}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() or path.is_symlink():
            yield path.relative_to(folder).as_posix(), path


def _may_be_added(name: str, path: Path) -> bool:
    known = name in OWN or ADDED.fullmatch(name) or path.suffix.lower() in (*IMAGES, *VIDEOS)
    return bool(known) and path.is_file() and not path.is_symlink() and (not _hidden(name) or name == ".gitattributes")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _foreign(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Files that do not belong: those in hidden folders and in folders of trackers by the folder's name."""
    strange = [name for name in names if not _may_be_added(name, folder / name)]
    tops = [name if "/" not in name else name.partition("/")[0] + "/" for name in strange]
    if tops:
        yield f"{_listed(list(dict.fromkeys(tops)))} not of the export: move what does not belong elsewhere"


def _digests(files: Mapping[str, Path], progress: Callable[[int, int], object]) -> dict[str, str]:
    sizes = {name: path.stat().st_size for name, path in files.items() if path.is_file()}
    done, whole, found = 0, sum(sizes.values()), dict[str, str]()
    for name in sizes:
        found[name] = sha256_of(files[name])
        done += sizes[name]
        progress(done, whole)
    return found


def _search(path: Path) -> tuple[list[str], list[str]]:
    """Where a file has secrets, and which paths it names."""
    if path.suffix.lower() not in TEXTS or not path.is_file() or path.stat().st_size > LARGEST_TEXT:
        return [], []
    try:
        text = read_text(path)
    except (OSError, ValueError):
        return [], []
    return list(dict.fromkeys(secrets_in(text)))[:LISTED], paths_in(text)


def _check_card(folder: Path, problems: list[str], notes: list[str]) -> Mapping[str, Any]:
    """The card's metadata, as the hub's client reads them; adds what is wrong with them."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = folder / README
    if not path.is_file():
        problems.append(f"there is no {README}: export it again, or write one with the hub's metadata")
        return {}
    try:
        text = read_text(path)
        table: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError, YAMLError, RecursionError) as error:
        problems.append(f"{README} has invalid metadata, which the hub refuses: {str(error).splitlines()[0]}")
        return {}
    licence = table.get("license")
    if licence in (None, UNKNOWN):
        notes.append(f"{README} names no licence: nobody may use the policy; set `license:` at its head")
    elif licence == "other" and not table.get("license_name"):
        notes.append(f"{README} has `license: other`: name it with `license_name:` and `license_link:`")
    for key in ("base_model", "datasets"):
        given = table.get(key)
        ids = given if isinstance(given, list) else [given] if given is not None else []
        if wrong := [str(one) for one in ids if not isinstance(one, str) or not _HUB_ID.fullmatch(one)]:
            problems.append(f"{README}: {key} must be ids on the hub, owner/name, and has {_listed(wrong)}")
    if "robotics" in (table.get("tags") or []) and not table.get("model-index"):
        notes.append(f"{README} has no success rate: `rlinf export --results` takes files of `rlinf eval --env`")
    if is_edited(text):
        notes.append(f"{README} was edited after the export; it is uploaded as it is")
    return table


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
